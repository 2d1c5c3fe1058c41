"""The score of a completion: a weighted sum of named score functions, checked."""

import math
import traceback
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from lmgym.io import quoted
from lmgym.tasks.base import Completion, Prompt, ScoreFunction

LARGEST_SCORE = torch.finfo(torch.float32).max
"""The largest absolute value of a score: rewards are float32."""


class ScoreError(ValueError):
    """A score function raised an exception, or returned something that is not a list of finite numbers.

    Attributes:
        name: of the component.
        prompt: the prompt of the row at fault; empty if the row is not known.
        completion: the completion of that row.
    """

    def __init__(self, message: str, name: str, prompt: str = "", completion: str = ""):
        super().__init__(message)
        self.name, self.prompt, self.completion = name, prompt, completion


class Score:
    """A weighted sum of named score functions.

    Args:
        components: for each name a score function, or a pair (weight, score function).
        shift: a constant that is subtracted from the sum, such as the mean score of the initial policy.
        finite: whether a score that is not finite raises; False lets it through, for a learner that skips such steps.

    Example:
        `Score({"reward_model": reward_model, "brevity": (-0.01, count_words)})`
    """

    def __init__(
        self,
        components: Mapping[str, ScoreFunction | tuple[float, ScoreFunction]],
        shift: float = 0.0,
        finite: bool = True,
    ):
        if not components:
            raise ValueError("a Score needs at least one component: Score({'name': function})")
        self.components = {
            name: component if isinstance(component, tuple) else (1.0, component)
            for name, component in components.items()
        }
        self.shift = shift
        self.finite = finite

    def __deepcopy__(self, memo: dict[int, Any]) -> "Score":
        # gymnasium's env.spec deep-copies every argument of make(); a reward model inside must not be copied.
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.components)

    def breakdown(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, list[float]]:
        """The unweighted score of each completion under each component.

        Raises:
            ScoreError: a component raises, returns the wrong number of scores, or a score that is not finite. The
                message names the component and the text.
        """
        return {
            name: _checked(name, _call(name, function, prompts, completions), prompts, completions, self.finite)
            for name, (_, function) in self.components.items()
        }

    def total(self, breakdown: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sums of the components, from the result of `breakdown`.

        Raises:
            ValueError: a sum is not finite.
        """
        columns = [[weight * s for s in breakdown[name]] for name, (weight, _) in self.components.items()]
        totals = [_sum(row) - self.shift for row in zip(*columns, strict=True)]
        if self.finite and not all(abs(total) <= LARGEST_SCORE for total in totals):
            raise ValueError(f"the weighted sum of the scores {', '.join(self.names)} is not finite: lower the weights")
        return totals

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return self.total(self.breakdown(prompts, completions))


def _call(name: str, function: ScoreFunction, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Any:
    try:
        return function(prompts, completions)
    except (ScoreError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = f"the score {name!r} raised {type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                function([prompt], [completion])
            except Exception:  # most likely the same error
                text = f"for the completion {completion.text!r} of the prompt {prompt.quoted()} (row {row})"
                raise ScoreError(f"{said} {text}", name, prompt.text, completion.text) from error
        raise ScoreError(f"{said}, but for none of the {len(completions)} completions alone", name) from error


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # beyond the range of floats, or ∞ − ∞
        return sum(numbers)


def _checked(
    name: str, scores: Any, prompts: Sequence[Prompt], completions: Sequence[Completion], finite: bool
) -> list[float]:
    try:
        if isinstance(scores, str):
            raise TypeError("its letters are no scores")
        given = list(islice(scores, len(completions) + 1))  # one more than expected: the iterator may never end
    except TypeError:
        message = f"the score {name!r} must return one number per completion, not {quoted(scores)}"
        raise ScoreError(message, name) from None
    if len(given) != len(completions):
        count = f"{len(given)}" if len(given) < len(completions) else "more"
        raise ScoreError(
            f"the score {name!r} returned {count} numbers for {len(completions)} completions; it must return one for "
            "each, in order",
            name,
        )
    values = [_as_number(name, row, *each) for row, each in enumerate(zip(given, prompts, completions, strict=True))]
    for row, (value, prompt, completion) in enumerate(zip(values, prompts, completions, strict=True)):
        if finite and not abs(value) <= LARGEST_SCORE:
            raise ScoreError(
                f"the score {name!r} returned {value} for the completion {completion.text!r} of the prompt "
                f"{prompt.quoted()} (row {row}); scores must be finite, in float32",
                name,
                prompt.text,
                completion.text,
            )
    return values


def _as_number(name: str, row: int, value: Any, prompt: Prompt, completion: Completion) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError("a text is not a number")
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is a tensor of several numbers
        raise ScoreError(
            f"the score {name!r} must return one number per completion, not {quoted(value)} as for the completion "
            f"{completion.text!r} of the prompt {prompt.quoted()} (row {row})",
            name,
            prompt.text,
            completion.text,
        ) from None
