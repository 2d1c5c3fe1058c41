"""The table of environments: id, task, model, budgets. Importing it imports no torch.

A change that could change results gets a new version suffix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    from lmgym.env import TokenEnv, TokenVectorEnv
    from lmgym.models import LanguageModel
    from lmgym.tasks.base import Task


@dataclass(frozen=True)
class TaskSpec:
    """A row of the table.

    Attributes:
        id: the Gymnasium id, "namespace/Name-v0".
        task: makes the task; a callable, or "module:name".
        summary: one line for `lmgym envs`.
        model: the default model.
        reward_model: scores the task's completions where the task alone cannot.
        arguments: budgets and other arguments of `TokenVectorEnv`.
    """

    id: str
    task: "Callable[[], Task] | str"
    summary: str
    model: str = "tiny"
    reward_model: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


TASK_SPECS: dict[str, TaskSpec] = {}
ENTRY_POINT_GROUP = "lmgym.tasks"
"""The entry points by which other packages offer tasks."""


def register_task(
    id: str,
    task: "Callable[[], Task] | str",
    *,
    summary: str = "",
    model: str = "tiny",
    reward_model: str | None = None,
    **arguments: Any,
) -> None:
    """Registers an environment for a task, so that `gymnasium.make(id)` and `lmgym train id` find it.

    Args:
        id: a Gymnasium id such as "me/Haiku-v0".
        task: a class or function that makes the task, or "module:name", which is imported when needed.
        summary: one line for `lmgym envs`.
        model: the default model.
        reward_model: the default reward model, for a task that has no score of its own.
        **arguments: defaults of `lmgym.TokenVectorEnv`'s arguments, such as max_new_tokens.

    Raises:
        ValueError: the id is taken.
    """
    if id in TASK_SPECS:
        raise ValueError(f"the environment {id!r} is already registered: choose another name or version")
    TASK_SPECS[id] = TaskSpec(id, task, summary, model, reward_model, arguments)
    gym.register(
        id,
        entry_point="lmgym.registry:make",
        vector_entry_point="lmgym.registry:make_vec",
        kwargs={"entry": id},  # not "id", which is an argument of gymnasium.make itself
    )


def find_spec(name: str) -> TaskSpec:
    """Finds a table row by id, or by the bare name of one of lmgym's own ("Sentiment").

    Raises:
        ValueError: there is none; it lists what there is.
    """
    for id in (name, f"lmgym/{name}", f"lmgym/{name}-v0"):
        if id in TASK_SPECS:
            return TASK_SPECS[id]
    raise ValueError(
        f"no task {name!r}. Registered are: {', '.join(sorted(TASK_SPECS))}. A task of your own is registered with "
        "lmgym.register_task(id, TaskClass) in a module that is imported first"
    )


def make_task(entry: TaskSpec) -> "Task":
    """Makes the task of a table row.

    Raises:
        ValueError: there is no such module or name, or what it makes is no task; it says what is registered.
    """
    from lmgym.tasks.base import Task

    make = entry.task
    if isinstance(make, str):
        module, _, name = make.partition(":")
        try:
            make = getattr(import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the environment {entry.id!r} is registered with the task {entry.task!r}, which cannot be had "
                f"({error}): write it as module:name"
            ) from error
    task = make() if callable(make) else make
    if not isinstance(task, Task):
        raise ValueError(
            f"the environment {entry.id!r} is registered with {entry.task!r}, which makes {task!r}, no Task"
        )
    return task


def default_arguments(entry: TaskSpec, task: "Task") -> dict[str, Any]:
    """`TokenVectorEnv`'s arguments for a table row: what it was registered with, over what its task asks for."""
    return {**task.budgets, **entry.arguments}


def make(entry: str, **arguments: Any) -> "TokenEnv":
    """The entry point of `gymnasium.make`; takes `TokenEnv`'s arguments, with names allowed for models."""
    from lmgym.env import TokenEnv

    return TokenEnv(**_resolved(entry, arguments))


def make_vec(entry: str, num_envs: int = 1, **arguments: Any) -> "TokenVectorEnv":
    """The entry point of `gymnasium.make_vec`; takes `TokenVectorEnv`'s arguments, with names allowed for models."""
    from lmgym.env import TokenVectorEnv

    return TokenVectorEnv(num_envs, **_resolved(entry, arguments))


def _resolved(id: str, given: dict[str, Any]) -> dict[str, Any]:
    from lmgym.models import load

    entry = find_spec(id)
    task = given.get("task") or make_task(entry)
    arguments = {**default_arguments(entry, task), **given, "task": task}
    device, dtype = arguments.pop("device", "cpu"), arguments.pop("dtype", "float32")
    model: str | LanguageModel = arguments.pop("model", entry.model)
    arguments["model"] = load(model, device=device, dtype=dtype) if isinstance(model, str) else model
    score = arguments.pop("score", None) or entry.reward_model
    if isinstance(score, str):
        from lmgym.reward import RewardModel, Score

        score = Score({"reward_model": RewardModel.load(score, device=device)})
    arguments["score"] = score
    return arguments


def register_all() -> None:
    """Registers lmgym's own environments, and those that installed packages offer."""
    register_task(
        "lmgym/Sentiment-v0",
        "lmgym.tasks.sentiment:Sentiment",
        summary="continue an opening so that it reads positive; scored by a learned reward model",
        reward_model="tiny-reward",
        max_prompt_tokens=40,
        max_new_tokens=48,
    )
    for name, summary in (
        ("Sort", "put letters in order"),
        ("Reverse", "write letters backwards"),
        ("Arithmetic", "add two numbers"),
    ):
        register_task(
            f"lmgym/{name}-v0",
            f"lmgym.tasks.{name.lower()}:{name}",
            summary=f"{summary}; scored by a rule",
            max_prompt_tokens=12,
            max_new_tokens=8,
        )
    register_task(
        "lmgym/Bandit-v0",
        "lmgym.tasks.probe:Bandit",
        summary="one token, known optimum: a probe for algorithms",
        model="probe",
        max_prompt_tokens=4,
        max_new_tokens=1,
    )
    register_task(
        "lmgym/Tree-v0",
        "lmgym.tasks.probe:Tree",
        summary="up to three tokens, known optimum, with a decoy: a probe for algorithms",
        model="probe",
        max_prompt_tokens=4,
        max_new_tokens=3,
    )
    # A package offers tasks by entry points: the name is the environment's id, the value "module:TaskClass". Only the
    # names are read here; the module is imported when the environment is made.
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name not in TASK_SPECS:
            register_task(point.name, point.value, summary=f"from {point.value.partition(':')[0]}")
