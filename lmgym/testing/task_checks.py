"""The contract of a task."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from lmgym.io import quoted
from lmgym.tasks.base import Completion, Prompt, ScoreFunction, Split, Task


def check_task(task: Task, draws: int = 50, allow_shared_prompts: bool = False) -> None:
    """Checks that a task keeps its contract. Call it in the tests of your own task.

    It draws prompts of both splits and scores demonstrations, or a few unusual texts if the task has no demonstrations.
    Prompts must depend only on the generator, the splits must share no prompt, and scoring must give one finite number
    for each completion, whatever its text, in any batch and any order.

    Args:
        task: the task to check.
        draws: how many prompts of each split to draw.
        allow_shared_prompts: for probes whose few prompts are the same in both splits.

    Raises:
        AssertionError: a part of the contract is broken. The message names it and gives the value.
    """
    assert isinstance(task, Task), f"{task!r} is not an lmgym.Task: subclass it, with sample() and score()"
    assert task.name, "name is empty: it labels scores and logs"
    texts: dict[Split, list[str]] = {}
    prompts: list[Prompt] = []
    for split in ("train", "test"):
        first, second = (_draw(task, split, draws) for _ in range(2))
        assert first == second, (
            f"sample() gave different {split} prompts for the same generator: draw from the `rng` argument only"
        )
        for prompt in first:
            assert isinstance(prompt, Prompt), f"sample() must return a Prompt, not {prompt!r}"
            assert isinstance(prompt.text, str), f"a prompt's text must be a str: {quoted(prompt)}"
            assert prompt.text or prompt.token_ids, f"a prompt needs a text that is not empty: {prompt!r}"
        prompts += first
        texts[split] = [prompt.text or str(prompt.token_ids) for prompt in first]
    shared = set(texts["train"]) & set(texts["test"])
    assert allow_shared_prompts or not shared, (
        f"the splits share the prompt {sorted(shared)[0]!r}: test prompts must not occur in training. Use "
        "lmgym.tasks.sample_in_split"
    )
    completions = [_completion(task, prompt, index) for index, prompt in enumerate(prompts)]
    for name, method in (("score", task.score), ("gold", task.gold)):
        _check_scores(name, method, prompts, completions)
    if task.best is not None:
        most = max(task.gold(prompts, completions))
        assert most <= task.best + 1e-9, f"gold() gave {most}, which is above best = {task.best}"


def _draw(task: Task, split: Split, draws: int) -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [task.sample(rng, split) for _ in range(draws)]


def _completion(task: Task, prompt: Prompt, index: int) -> Completion:
    odd = ("", " ", "a", "\n\n\n", "42 é 漢 🙂 \x00", "word " * 200, "<eos>", "-1e999")
    if index % 3 == 0:
        return Completion(odd[index // 3 % len(odd)], "length" if index % 2 else "stop", 3)
    try:
        text = task.demonstrate(prompt, np.random.default_rng(index))
    except NotImplementedError:
        return Completion(odd[index % len(odd)], "stop", 3)
    assert isinstance(text, str), f"demonstrate() must return a text, not {text!r}"
    return Completion(text, "stop", len(text))


def _check_scores(
    name: str, method: ScoreFunction, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> None:
    scores = _numbers(name, method, prompts, completions)
    for score, prompt, completion in zip(scores, prompts, completions, strict=True):
        assert math.isfinite(score), f"{name}() gave {score} for {completion!r} after {prompt!r}"
    backwards = _numbers(name, method, prompts[::-1], completions[::-1])[::-1]
    alone = [_numbers(name, method, [p], [c])[0] for p, c in zip(prompts, completions, strict=True)]
    for label, other in (("in another order", backwards), ("alone", alone)):
        for score, again, completion in zip(scores, other, completions, strict=True):
            assert math.isclose(score, again, rel_tol=1e-4, abs_tol=1e-4), (
                f"{name}() of {completion!r} is {score} in a batch and {again} {label}: a score may depend only on "
                "its own prompt and completion"
            )


def _numbers(
    name: str, method: ScoreFunction, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[float]:
    given: Any = method(prompts, completions)
    try:
        # At most one more than expected: the iterator may never end.
        scores = [float(s) for s in islice(given, len(completions) + 1)]
    except (TypeError, ValueError, OverflowError):
        raise AssertionError(f"{name}() must give one number for each completion, not {quoted(given)}") from None
    assert len(scores) == len(completions), f"{name}() gave {len(scores)} numbers for {len(completions)} completions"
    return scores
