"""Texts to learn from as sequences of tokens: demonstrations and comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from lmgym.models.chat import assistant_turns
from lmgym.models.encode_after import encode_after
from lmgym.models.language_model import LanguageModel
from lmgym.models.sequences import Sequences
from lmgym.tasks.base import Prompt
from lmgym.tasks.messages import Message

EncodedExample = tuple[list[int], int]
"""The token ids of a whole text, and how many of them belong to the prompt."""


@dataclass(frozen=True)
class Example:
    """A text to learn from: `completion` is learned, `prompt` is given. At least one of them is not empty."""

    prompt: str
    completion: str
    finished: bool = True
    """Whether the text ends here, so that the end-of-sequence token is learned too."""
    messages: Sequence[Message] = ()
    """The conversation that `completion` answers, if the prompt is one; see `lmgym.Prompt`."""
    token_ids: Sequence[int] = ()
    """The prompt, if it is given as token ids; `prompt` is then for people."""

    @classmethod
    def of(cls, prompt: Prompt, completion: str, finished: bool = True) -> "Example":
        """A prompt with its completion."""
        return cls(prompt.text, completion, finished, prompt.messages, prompt.token_ids)


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

    Of a conversation, only the last answer is the completion; `encode_turns` learns every answer in it.

    Args:
        lm: gives the tokenizer.
        example: the text.
        max_tokens: cuts off what follows; None keeps everything.

    Warns:
        UserWarning: no tokens of this tokenizer decode to the completion, so that another text is learned.
    """
    if example.messages:
        prompt, answer = lm.text.chat.encode_answer(example.messages, example.completion, example.finished)
        return [*prompt, *answer][:max_tokens], len(prompt)
    if example.token_ids:
        (prompt,) = lm.text.encode_prompts([Prompt(token_ids=example.token_ids)])
        end = [lm.eos_ids[0]] if example.finished else []
        return [*prompt, *encode_after(lm.tokenizer, prompt, example.completion), *end][:max_tokens], len(prompt)
    prompt = lm.text.encode(example.prompt) if example.prompt else []
    whole = lm.text.encode(example.prompt + example.completion)
    joint = whole[len(prompt) :] if whole[: len(prompt)] == prompt else None
    if joint is None or (prompt and not _is_faithful(lm, example, prompt, joint)):
        whole = prompt + encode_after(lm.tokenizer, prompt, example.completion, joint)
    whole = [*whole, lm.eos_ids[0]] if example.finished else whole
    # Without a prompt the first token has no context to be predicted from, so it is given.
    return whole[:max_tokens], max(1, len(prompt))


def _is_faithful(lm: LanguageModel, example: Example, prompt: list[int], ids: list[int]) -> bool:
    """Whether the ids after the prompt decode to the completion, or all of them to the whole text."""
    if lm.text.decode_completion(prompt, ids) == example.completion:
        return True
    return lm.text.decode([*prompt, *ids]) == example.prompt + example.completion


def encode_turns(lm: LanguageModel, example: Example, max_tokens: int | None = None) -> list[EncodedExample]:
    """The token ids of a text to learn from: of a conversation, one item for each answer of the assistant.

    Each answer is read after exactly those tokens after which the model will give it. A mask over one text would do the
    same for many chat templates, but not for those that write an earlier answer otherwise than the latest one.

    Args:
        lm: gives the tokenizer.
        example: the text.
        max_tokens: cuts off what follows; None keeps everything.
    """
    turns = assistant_turns(example.messages) if example.messages else []
    earlier = [Example("", content, messages=before) for before, content in turns]
    return [encode_example(lm, turn, max_tokens) for turn in (*earlier, example)]


def collate_examples(lm: LanguageModel, rows: Sequence[EncodedExample]) -> ExampleBatch:
    """Encoded texts as right-padded tensors.

    Raises:
        ValueError: a text is longer than the model can read.
    """
    width = max(len(ids) for ids, _ in rows)
    if lm.positions is not None and width > lm.positions:
        raise ValueError(
            f"a text has {width} tokens, but the model {lm.name!r} has only {lm.positions} positions: lower max_tokens"
        )
    ids = torch.tensor([ids + [lm.pad_id] * (width - len(ids)) for ids, _ in rows], device=lm.device)
    position = torch.arange(1, width, device=lm.device)
    first = torch.tensor([start for _, start in rows], device=lm.device)[:, None]
    last = torch.tensor([len(ids) for ids, _ in rows], device=lm.device)[:, None]
    all_allowed = torch.ones(width - 1, lm.vocabulary, dtype=torch.bool, device=lm.device)
    first_mask = torch.ones_like(ids[:, :1], dtype=torch.bool)
    sequences = Sequences(ids[:, :1], first_mask, ids[:, 1:], position < last, all_allowed)
    return ExampleBatch(sequences, (position >= first) & (position < last))
