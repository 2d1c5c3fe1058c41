"""Reward modelling: Bradley-Terry maximum likelihood of comparisons (Stiennon et al. 2020; Ouyang et al. 2022).

All completions of a prompt are in the same minibatch. Each goes through the model once, for all pairs that contain it.

Papers: https://arxiv.org/abs/2009.01325 (Stiennon et al.), https://arxiv.org/abs/2203.02155 (Ouyang et al.).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from agents import functional as F
from agents.learner import STEP_METRICS, Learner
from agents.training import require
from lmgym.models import Example
from lmgym.preferences import Comparison
from lmgym.reward import RewardModel, read_text


@dataclass(frozen=True)
class Config:
    """Reward modelling's own settings."""

    epochs: int = 1
    """Passes over the comparisons."""
    minibatch_prompts: int = 16
    """Comparisons (prompts) per optimizer step."""

    def __post_init__(self) -> None:
        require.in_range(self, "epochs", "minibatch_prompts", least=1)


METRICS = {
    "loss/train": "−log σ(score of the better − score of the worse), mean over the minibatch's prompts",
    "accuracy/train": "share of pairs whose scores agree with the label, before the step",
    "accuracy/test": "the same on held-out comparisons",
    "calibration/ece": "expected calibration error of σ(score difference) on held-out comparisons, 10 bins",
} | STEP_METRICS


def scores_of(model: RewardModel, comparisons: Sequence[Comparison]) -> list[Tensor]:
    """The scores of each comparison's K completions, [K] each, with gradients."""
    texts = [read_text(c.as_prompt, text) for c in comparisons for text in c.ranked]
    scores = model.raw_scores(texts, [True] * len(texts), rows=16)
    return list(scores.split([len(c.ranked) for c in comparisons]))


def comparison_loss(scores: Float[Tensor, " K"], comparison: Comparison) -> Float[Tensor, ""]:
    """`functional.ranking_loss`; of a tie, its mean over the order and the reverse: the cross-entropy with target ½."""
    if not comparison.is_tie:
        return F.ranking_loss(scores)
    return (F.ranking_loss(scores) + F.ranking_loss(scores.flip(0))) / 2


def margins_of(scores: Sequence[Tensor]) -> Tensor:
    """The score of the better (by label) minus that of the worse, for all pairs of all rankings."""
    return torch.cat([(s[:, None] - s[None])[tuple(torch.triu_indices(len(s), len(s), 1))] for s in scores])


@torch.no_grad()
def evaluate(model: RewardModel, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Accuracy and calibration on held-out comparisons; ties have no right answer and are left out."""
    comparisons = [comparison for comparison in comparisons if not comparison.is_tie]
    parts = [scores_of(model, comparisons[start : start + 32]) for start in range(0, len(comparisons), 32)]
    margins = margins_of([scores for part in parts for scores in part])
    # Count each pair in both orders: with the better one always first, the outcome would always be "true".
    both = torch.cat([margins, -margins])
    outcome = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)]).bool()
    return {
        "accuracy/test": float((margins > 0).float().mean()),
        "calibration/ece": float(F.expected_calibration_error(both.sigmoid(), outcome)),
    }


def train(
    model: RewardModel,
    comparisons: Sequence[Comparison],
    held_out: Sequence[Comparison],
    learner: Learner,
    config: Config,
) -> Iterator[dict[str, float]]:
    """Trains on the comparisons; yields `METRICS` after each step. Held-out metrics are in the last step only."""
    if not comparisons:
        raise ValueError("there are no comparisons to train a reward model on")
    steps = config.epochs * -(-len(comparisons) // config.minibatch_prompts)

    def loss(part: Sequence[Comparison]) -> Tensor:
        """[prompts] the loss of each comparison."""
        scores = scores_of(model, part)
        loss = torch.stack([comparison_loss(s, c) for s, c in zip(scores, part, strict=True)])
        learner.metrics.add("loss/train", loss)
        decided = [s for s, c in zip(scores, part, strict=True) if not c.is_tie]
        if decided:
            learner.metrics.add("accuracy/train", (margins_of(decided) > 0).float())
        return loss

    def length(comparison: Comparison) -> int:
        return model.count_tokens([read_text(comparison.as_prompt, text) for text in comparison.ranked])

    for step, indices in learner.shuffled_minibatches(len(comparisons), config.minibatch_prompts, config.epochs):
        minibatch = [comparisons[i] for i in indices.tolist()]
        count = len(minibatch)
        learner.minimise(minibatch, lambda part, n=count: loss(part).sum() / n, model=model, tokens=length)
        yield learner.drain() | (evaluate(model, held_out) if held_out and step + 1 == steps else {})


@torch.no_grad()
def normalise(model: RewardModel, texts: Sequence[str | Example], finished: Sequence[bool] | None = None) -> None:
    """Scales and shifts the scores, so that those of `texts` have mean 0 and standard deviation 1.

    Ziegler et al. 2019, section 2.1 (https://arxiv.org/abs/1909.08593). The texts should be samples of the initial
    policy. The scale is multiplied into the head's weights; the shift is the attribute `shift` of the model.

    Raises:
        ValueError: all scores are equal.
    """
    spread = float(model.score_texts(texts, finished).std())
    if not spread > 0:
        raise ValueError(
            f"the reward model gives all {len(texts)} texts the same score, so it has learned nothing: check its "
            "training data"
        )
    model.scale(1 / spread)
    model.shift = float(model.score_texts(texts, finished).mean())
