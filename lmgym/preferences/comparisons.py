"""Comparisons, and their JSONL file."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmgym.io import atomic
from lmgym.tasks.base import Prompt
from lmgym.tasks.messages import Message


@dataclass(frozen=True)
class Comparison:
    """A ranking of completions of one prompt.

    Attributes:
        prompt: the prompt's text; with `messages`, their transcript by default.
        ranked: at least two completions, the best first.
        messages: the conversation that the completions answer; see `lmgym.Prompt`.
        is_tie: whether all of them are equally good, so that the order means nothing; only readers that are asked for
            ties give such comparisons.
    """

    prompt: str
    ranked: tuple[str, ...]
    messages: Sequence[Message] = ()
    is_tie: bool = False

    def __post_init__(self) -> None:
        if len(self.messages):
            prompt = self.as_prompt
            object.__setattr__(self, "prompt", prompt.text)
            object.__setattr__(self, "messages", prompt.messages)

    @property
    def as_prompt(self) -> Prompt:
        """What the completions continue."""
        return Prompt(self.prompt, messages=self.messages)

    @property
    def pairs(self) -> int:
        """The number of pairs in the ranking of K completions, K (K − 1) / 2."""
        return len(self.ranked) * (len(self.ranked) - 1) // 2


def write_comparisons(path: str | os.PathLike[str], comparisons: Iterable[Comparison]) -> None:
    """Writes comparisons to a file that `read_comparisons` can read."""
    rows = (json.dumps(comparison_row(comparison), ensure_ascii=False) + "\n" for comparison in comparisons)
    atomic.write(path, "".join(rows))


def comparison_row(comparison: Comparison) -> dict[str, Any]:
    """A comparison as a row of a file: prompt (and messages), chosen and rejected, or ranking. Ties have label ½."""
    row: dict[str, Any] = {"prompt": comparison.prompt}
    if comparison.messages:
        row["messages"] = list(comparison.messages)
    if len(comparison.ranked) == 2:
        row["chosen"], row["rejected"] = comparison.ranked
    else:
        row["ranking"] = list(comparison.ranked)
    return row | ({"label": 0.5} if comparison.is_tie else {})
