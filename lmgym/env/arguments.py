"""Checks of an environment's arguments. All of them run before anything is built."""

import math
import sys
from collections.abc import Sequence
from typing import Any, Literal

from lmgym.models import LanguageModel
from lmgym.reward import check_reward_estimator
from lmgym.tasks.base import Task

OnLimit = Literal["terminate", "truncate"]
LongPrompts = Literal["error", "truncate"]
Output = Literal["torch", "numpy"]
RenderMode = Literal["ansi", "human", "rgb_array"]

RENDER_MODES = ("ansi", "human", "rgb_array")
CHOICES: dict[str, Sequence[Any]] = {
    "kl": ("reference", "sampled", "none"),
    "on_limit": ("terminate", "truncate"),
    "long_prompts": ("error", "truncate"),
    "output": ("torch", "numpy"),
    "split": ("train", "test"),
    "render_mode": (None, *RENDER_MODES),
}
"""The arguments that take one of a few values, with those values."""


def check_arguments(
    *,
    num_envs: int,
    task: Any,
    model: Any,
    max_prompt_tokens: int,
    max_new_tokens: int,
    min_new_tokens: int,
    stop: Any,
    missing_eos_score: Any,
    kl_estimator: str,
    kind: type,
    **choices: Any,
) -> None:
    """Raises a ValueError unless the arguments of a `TokenVectorEnv` are valid and fit one another."""
    check_reward_estimator(kl_estimator)
    check_choices(**choices)
    check_methods(kind)
    check_parts(num_envs, task, model)
    check_stop_strings("stop", stop)
    check_stop_strings("task.stop", task.stop)
    check_missing_eos_score("missing_eos_score", missing_eos_score)
    check_missing_eos_score("task.missing_eos_score", task.missing_eos_score)
    check_budgets(model, max_prompt_tokens, max_new_tokens, min_new_tokens, choices["on_limit"])


def check_choices(**given: Any) -> None:
    """Raises a ValueError unless each argument has one of its values in `CHOICES`."""
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(map(repr, CHOICES[name]))}")


def check_methods(kind: type) -> None:
    """Raises a ValueError if a subclass has action masks of its own that neither rewards nor rollouts would ask for."""
    owner = next(base for base in kind.__mro__ if "action_masks" in vars(base))
    if owner.__module__ != "lmgym.env.vector":
        raise ValueError(
            f"{owner.__name__} overrides action_masks(), which only reports the masks: rewards, rollouts and the "
            "reference would ignore it. Pass super().__init__(..., action_mask=FUNCTION) instead; it holds everywhere"
        )


def check_parts(num_envs: int, task: Any, model: Any) -> None:
    """Raises a ValueError unless the model is a LanguageModel, the task a Task, and there is at least one row."""
    if not isinstance(model, LanguageModel):
        raise ValueError(f"model={model!r} is not a LanguageModel: load it first, for example with lmgym.load('tiny')")
    if not isinstance(task, Task):
        raise ValueError(
            f"task={task!r} is not an lmgym.Task: pass an instance of a subclass with sample() and score()"
        )
    if num_envs < 1:
        raise ValueError(f"num_envs={num_envs} must be at least 1")


def check_stop_strings(name: str, strings: Any) -> None:
    """Raises a ValueError unless `strings` is a sequence of strings, none of them empty."""
    if isinstance(strings, str) or not all(isinstance(string, str) for string in strings):
        raise ValueError(f"{name}={strings!r} must be a tuple of strings: a single one is ('END',)")
    if "" in strings:
        raise ValueError(f"{name} holds an empty string, which every text contains: give at least one character")


def check_missing_eos_score(name: str, score: Any) -> None:
    """Raises a ValueError unless `score` is a finite number, "task" or None."""
    if not (score is None or score == "task" or (isinstance(score, int | float) and math.isfinite(score))):
        raise ValueError(f"{name}={score!r} must be a finite number, 'task' or None")


def check_budgets(
    model: LanguageModel, max_prompt_tokens: int, max_new_tokens: int, min_new_tokens: int, on_limit: str
) -> None:
    """Raises a ValueError unless the token budgets are consistent and fit the positions of the model."""
    if max_prompt_tokens < 1 or max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(
            f"max_prompt_tokens={max_prompt_tokens} and max_new_tokens={max_new_tokens} must be at least 1, and "
            f"min_new_tokens={min_new_tokens} between 0 and max_new_tokens"
        )
    if on_limit == "truncate" and max_new_tokens < 2:
        raise ValueError("on_limit='truncate' needs max_new_tokens of at least 2: a row may not end at its first step")
    positions = model.positions
    if positions is not None and max_prompt_tokens + max_new_tokens > positions:
        raise ValueError(
            f"max_prompt_tokens={max_prompt_tokens} plus max_new_tokens={max_new_tokens} exceed the {positions} "
            f"positions of the model {model.name!r}: lower one of them"
        )


NUMPY_WRAPPERS = ("common", "dict_info_to_list", "stateful_observation", "stateful_reward")
"""The modules of `gymnasium.wrappers.vector` whose wrappers compute in NumPy with what an environment returns."""


def check_callers(env: Any) -> None:
    """Raises a ValueError if a wrapper of Gymnasium that computes in NumPy resets an environment with torch output.

    It would fail later, in the middle of its own code. An environment does not know its wrappers, but they call it.
    """
    frame = sys._getframe(1) if env.output == "torch" else None
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("gymnasium."):
            wrapper = frame.f_locals.get("self")
            package, _, module = type(wrapper).__module__.rpartition(".")
            in_numpy = package == "gymnasium.wrappers.vector" and module in NUMPY_WRAPPERS
            if in_numpy and getattr(wrapper, "unwrapped", None) is env:
                raise ValueError(
                    f"{type(wrapper).__name__} computes in NumPy, and this environment returns torch tensors: make it "
                    "with output='numpy', for example gymnasium.make_vec(id, num_envs=8, output='numpy')"
                )
        frame = frame.f_back
