"""Texts to learn from as sequences of tokens: demonstrations and comparisons."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from lmgym.models.language_model import LanguageModel
from lmgym.models.sequences import Sequences
from lmgym.models.tokenising import token_ids

EncodedExample = tuple[list[int], int]
"""The token ids of a whole text, and how many of them belong to the prompt."""


@dataclass(frozen=True)
class Example:
    """A text to learn from: `completion` is learned, `prompt` is given. At least one of them is not empty."""

    prompt: str
    completion: str
    finished: bool = True
    """Whether the text ends here, so that the end-of-sequence token is learned too."""


class ExampleBatch(NamedTuple):
    """Encoded texts as tensors.

    Attributes:
        sequences: the first token of each text as its prompt, all others as tokens.
        is_learned: [B, T] True on the tokens of the completion, False on those of the prompt.
    """

    sequences: Sequences
    is_learned: Bool[Tensor, "B T"]

    def __getitem__(self, rows: Tensor) -> "ExampleBatch":  # pyright: ignore[reportIncompatibleMethodOverride]
        return ExampleBatch(self.sequences[rows], self.is_learned[rows])


def encode_example(lm: LanguageModel, example: Example, max_tokens: int | None = None) -> EncodedExample:
    """The token ids of a text, and how many of them belong to the prompt.

    Prompt and completion are tokenised together if that does not change the prompt's tokens, which are those that the
    policy will see. Otherwise they are tokenised separately, so that decoding gives the completion.

    Args:
        lm: gives the tokenizer.
        example: the text.
        max_tokens: cuts off what follows; None keeps everything.

    Warns:
        UserWarning: no tokens of this tokenizer decode to the completion, so that another text is learned.
    """
    prompt = lm.text.encode(example.prompt) if example.prompt else []
    whole = lm.text.encode(example.prompt + example.completion)
    together = whole[: len(prompt)] == prompt
    if not together or not _is_faithful(lm, example, prompt, whole[len(prompt) :]):
        whole = prompt + _completion_ids(lm, example, prompt, whole[len(prompt) :] if together else None)
    whole = [*whole, lm.eos_ids[0]] if example.finished else whole
    # Without a prompt the first token has no context to be predicted from, so it is given.
    return whole[:max_tokens], max(1, len(prompt))


ANCHORS = ("a", "\n", ".", "(", "1")
"""Texts before which a completion is tokenised, if a tokenizer changes the beginning of a text that stands alone."""


def _completion_ids(lm: LanguageModel, example: Example, prompt: list[int], joint: list[int] | None) -> list[int]:
    """The token ids of a completion, as far as possible those that decode to it; `joint` are not, if they are known."""
    texts = [example.completion, *ANCHORS, *(anchor + example.completion for anchor in ANCHORS)]
    alone, *others = token_ids(lm.tokenizer, texts, add_special_tokens=False)
    pairs = zip(others[: len(ANCHORS)], others[len(ANCHORS) :], strict=True)
    after_anchors = [ids[len(anchor) :] for anchor, ids in pairs if ids[: len(anchor)] == anchor]
    for candidate in (alone, *after_anchors):
        if _is_faithful(lm, example, prompt, candidate):
            return candidate
    warnings.warn(
        "the tokenizer changes some of the texts to learn from (letters, spaces or unknown characters): their tokens "
        "do not decode to the completions that were given, and what they decode to is learned",
        stacklevel=3,
    )
    return alone if joint is None else joint


def _is_faithful(lm: LanguageModel, example: Example, prompt: list[int], ids: list[int]) -> bool:
    """Whether the ids after the prompt decode to the completion, or all of them to the whole text."""
    if lm.text.decode_completion(prompt, ids) == example.completion:
        return True
    return lm.text.decode([*prompt, *ids]) == example.prompt + example.completion


def collate_examples(lm: LanguageModel, rows: Sequence[EncodedExample]) -> ExampleBatch:
    """Encoded texts as right-padded tensors."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [lm.pad_id] * (width - len(ids)) for ids, _ in rows], device=lm.device)
    position = torch.arange(1, width, device=lm.device)
    first = torch.tensor([start for _, start in rows], device=lm.device)[:, None]
    last = torch.tensor([len(ids) for ids, _ in rows], device=lm.device)[:, None]
    all_allowed = torch.ones(width - 1, lm.vocabulary, dtype=torch.bool, device=lm.device)
    first_mask = torch.ones_like(ids[:, :1], dtype=torch.bool)
    sequences = Sequences(ids[:, :1], first_mask, ids[:, 1:], position < last, all_allowed)
    return ExampleBatch(sequences, (position >= first) & (position < last))
