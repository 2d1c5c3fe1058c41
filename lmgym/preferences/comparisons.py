"""Comparisons, and their JSONL format."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lmgym.io import atomic, read_numbered
from lmgym.tasks.base import Prompt
from lmgym.tasks.messages import Message


@dataclass(frozen=True)
class Comparison:
    """A ranking of completions of one prompt.

    Attributes:
        prompt: the prompt's text; with `messages`, their transcript by default.
        ranked: at least two completions, the best first.
        messages: the conversation that the completions answer; see `lmgym.Prompt`.
    """

    prompt: str
    ranked: tuple[str, ...]
    messages: Sequence[Message] = ()

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


def read_comparisons(path: str | os.PathLike[str]) -> list[Comparison]:
    """Reads rows `{"prompt", "chosen", "rejected"}`, or `{"prompt", "ranking": [best, ..., worst]}`.

    Raises:
        ValueError: the file is empty or malformed. The message names the file and the line.
        FileNotFoundError: the file does not exist.
    """
    found = []
    for number, row in read_numbered(path, required=("prompt",)):
        ranked: Any = row["ranking"] if "ranking" in row else [row.get("chosen"), row.get("rejected")]
        texts = isinstance(ranked, list) and len(ranked) >= 2 and all(isinstance(text, str) for text in ranked)
        if not texts or not isinstance(row["prompt"], str):
            raise ValueError(
                f"{path}, line {number}: a comparison needs the texts 'prompt', 'chosen' and 'rejected', or 'prompt' "
                "and 'ranking', a list of at least two texts, the best first"
            )
        if len(set(ranked)) < len(ranked):
            raise ValueError(f"{path}, line {number}: a text is compared with itself; remove the row")
        found.append(Comparison(row["prompt"], tuple(ranked), row.get("messages") or ()))
    return found


def write_comparisons(path: str | os.PathLike[str], comparisons: Iterable[Comparison]) -> None:
    """Writes comparisons to a file that `read_comparisons` can read."""
    rows = []
    for comparison in comparisons:
        row: dict[str, object] = {"prompt": comparison.prompt}
        if comparison.messages:
            row["messages"] = list(comparison.messages)
        if len(comparison.ranked) == 2:
            row["chosen"], row["rejected"] = comparison.ranked
        else:
            row["ranking"] = list(comparison.ranked)
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    atomic.write(path, "".join(rows))
