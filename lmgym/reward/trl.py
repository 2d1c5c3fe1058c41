"""Reward functions in the form of TRL, as scores: `Score({"format": trl_reward(format_reward)})`. TRL is not needed.

TRL calls `f(prompts, completions, completion_ids, **columns)` and expects a number, or None, for each completion:
https://huggingface.co/docs/trl/grpo_trainer#using-a-custom-reward-function.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lmgym.tasks.base import Completion, Prompt, ScoreFunction

NOT_GIVEN = ("trainer_state", "log_extra", "log_metric", "environments")
"""What TRL's trainer gives besides, and no environment has."""


def trl_reward(function: Callable[..., Sequence[float | None]]) -> ScoreFunction:
    """A reward function in the form of TRL as a score function.

    It is called by keyword, with lists of one entry for each completion: `prompts` (texts, or conversations as lists of
    messages), `completions` (texts, or `[{"role": "assistant", "content": …}]` after a conversation), `completion_ids`
    (the sampled token ids), and each field of the rows' data under its own name. Without `**kwargs` it gets only what
    it names. None counts 0, as it does in TRL's sum over reward functions.

    Args:
        function: not a coroutine; it must not need what only TRL's trainer has, such as `trainer_state`.

    Raises:
        ValueError: it is a coroutine, or names something that only TRL's trainer has and that has no default.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ValueError(f"{name} is a coroutine (async def): give a plain function")
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for p in parameters.values():
        if p.name in NOT_GIVEN and p.default is p.empty and p.kind is not p.VAR_KEYWORD:
            raise ValueError(f"{name} needs {p.name!r}, which only TRL's trainer has: give it a default")

    def score(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        given = _arguments(prompts, completions)
        rewards = function(**(given if takes_all else {key: given[key] for key in given if key in parameters}))
        return [0.0 if reward is None else reward for reward in rewards]

    score.__name__ = name
    return score


def _arguments(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """The keyword arguments. A field that some rows lack is None there."""
    columns = dict.fromkeys(key for prompt in prompts for key in prompt.data)
    return {key: [prompt.data.get(key) for prompt in prompts] for key in columns} | {
        "prompts": [list(p.messages) if p.messages else p.text for p in prompts],
        "completions": [
            [{"role": "assistant", "content": c.text}] if p.messages else c.text
            for p, c in zip(prompts, completions, strict=True)
        ],
        "completion_ids": [list(c.token_ids) for c in completions],
    }
