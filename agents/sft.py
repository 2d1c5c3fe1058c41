"""Supervised fine-tuning: maximum likelihood of demonstrations (Ouyang et al. 2022, section 3.1).

Paper: https://arxiv.org/abs/2203.02155.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.learner import STEP_METRICS, Learner
from agents.training import require
from lmgym.models import EncodedExample, Example, LanguageModel, collate_examples, encode_turns, token_nll


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning's own settings."""

    epochs: int = 1
    """Passes over the examples."""
    minibatch_rows: int = 32
    """Examples per optimizer step."""
    max_tokens: int = 256
    """Token budget; longer texts are truncated, as are texts longer than the model can read."""

    def __post_init__(self) -> None:
        require.in_range(self, "epochs", "minibatch_rows", "max_tokens", least=1)


METRICS = {
    "loss/train": "negative log-likelihood of the minibatch's target tokens, mean over tokens, in nats",
    "loss/test": "the same on held-out examples",
} | STEP_METRICS


def encode(lm: LanguageModel, examples: Sequence[Example], config: Config) -> list[EncodedExample]:
    """The token ids of the examples: of a conversation, one item for each answer of the assistant.

    Texts are cut off after `max_tokens`, or where the model's positions end.
    """
    most = config.max_tokens if lm.positions is None else min(config.max_tokens, lm.positions)
    return [row for example in examples for row in encode_turns(lm, example, most)]


def nll(lm: LanguageModel, rows: Sequence[EncodedExample], adapter: str | None = None) -> tuple[Tensor, Tensor]:
    """[B, T] negative log-likelihood in nats of each token after the first, and [B, T] mask of the target tokens."""
    texts = collate_examples(lm, rows)
    return token_nll(lm, texts.sequences, adapter), texts.is_learned


@torch.no_grad()
def evaluate(lm: LanguageModel, examples: Sequence[Example], config: Config, adapter: str | None = None) -> float:
    """Mean negative log-likelihood of the examples' target tokens, in nats.

    Raises:
        ValueError: none of the examples has a target token within `max_tokens`.
    """
    total, count = 0.0, 0
    rows = encode(lm, examples, config)
    for start in range(0, len(rows), 64):
        loss, mask = nll(lm, rows[start : start + 64], adapter)
        total, count = total + float(loss[mask].sum()), count + int(mask.sum())
    require.something_to_learn([count > 0] * len(rows), "held-out examples", config.max_tokens)
    return total / max(1, count)


def train(
    lm: LanguageModel,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    learner: Learner,
    config: Config,
    adapter: str | None = None,
) -> Iterator[dict[str, float]]:
    """Trains on the examples; yields `METRICS` after each step, with the held-out loss in the first and the last."""
    if not examples:
        raise ValueError("there are no examples to fine-tune on: pass at least one")
    rows = encode(lm, examples, config)
    learned = [len(ids) > given for ids, given in rows]
    require.something_to_learn(learned, "examples", config.max_tokens, learner.say)
    rows = [row for row, teaches in zip(rows, learned, strict=True) if teaches]
    steps = config.epochs * -(-len(rows) // config.minibatch_rows)

    def loss(part: Sequence[EncodedExample]) -> Tensor:
        """The negative log-likelihood, summed over the target tokens of these examples, in nats."""
        loss, mask = nll(lm, part, adapter)
        learner.metrics.add("loss/train", loss, mask)
        return torch.where(mask, loss, 0.0).sum()

    for step, indices in learner.shuffled_minibatches(len(rows), config.minibatch_rows, config.epochs):
        measured = {"loss/test": evaluate(lm, held_out, config, adapter)} if held_out and not step else {}
        minibatch = [rows[i] for i in indices.tolist()]
        targets = sum(len(ids) - given for ids, given in minibatch)
        describe, length = (lambda row: repr(lm.text.decode(row[0]))), (lambda row: len(row[0]))
        learner.minimise(minibatch, lambda part, n=targets: loss(part) / n, describe, model=lm, tokens=length)
        if held_out and step + 1 == steps:
            measured = {"loss/test": evaluate(lm, held_out, config, adapter)}
        yield learner.drain() | measured
