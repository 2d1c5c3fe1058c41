"""Texts as sequences of tokens: demonstrations to imitate, comparisons to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from lmgym.models.language_model import LanguageModel
from lmgym.models.sequences import Sequences
from lmgym.models.text import token_ids

EncodedExample = tuple[list[int], int]
"""Token ids of a whole text, and how many of them are the prompt's."""


@dataclass(frozen=True)
class Example:
    """A text to learn from: `completion` is learned, `prompt` is given. They may not both be empty."""

    prompt: str
    completion: str
    finished: bool = True
    """Whether the text ends here, so that ending is learned too."""


class ExampleBatch(NamedTuple):
    """Texts ready to be read.

    Attributes:
        sequences: each text's first token as its prompt, all the others as tokens.
        is_learned: [B, T] True on the tokens of the completion; the prompt's other tokens are given.
    """

    sequences: Sequences
    is_learned: Bool[Tensor, "B T"]

    def __getitem__(self, rows: Tensor) -> "ExampleBatch":  # pyright: ignore[reportIncompatibleMethodOverride]
        return ExampleBatch(self.sequences[rows], self.is_learned[rows])


def encode(lm: LanguageModel, example: Example, max_tokens: int | None = None) -> EncodedExample:
    """Token ids of a text, and how many of them are the prompt's.

    Prompt and completion are tokenised together where that leaves the prompt's tokens as they are: it is what the
    policy will see before it, and the completion's tokens are the natural ones.
    """
    prompt = lm.encode(example.prompt) if example.prompt else []
    whole = lm.encode(example.prompt + example.completion)
    if whole[: len(prompt)] != prompt:
        whole = prompt + token_ids(lm.tokenizer, [example.completion], add_special_tokens=False)[0]
    whole = [*whole, lm.eos_ids[0]] if example.finished else whole
    # Without a prompt the first token has nothing before it, and so is given.
    return whole[:max_tokens], max(1, len(prompt))


def collate(lm: LanguageModel, rows: Sequence[EncodedExample]) -> ExampleBatch:
    """Right-padded sequences of encoded texts."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [lm.pad_id] * (width - len(ids)) for ids, _ in rows], device=lm.device)
    position = torch.arange(1, width, device=lm.device)
    first = torch.tensor([start for _, start in rows], device=lm.device)[:, None]
    last = torch.tensor([len(ids) for ids, _ in rows], device=lm.device)[:, None]
    everything = torch.ones(width - 1, lm.vocabulary, dtype=torch.bool, device=lm.device)
    first_mask = torch.ones_like(ids[:, :1], dtype=torch.bool)
    sequences = Sequences(ids[:, :1], first_mask, ids[:, 1:], position < last, everything)
    return ExampleBatch(sequences, (position >= first) & (position < last))
