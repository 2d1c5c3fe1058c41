"""Reward modelling: Bradley-Terry maximum likelihood of comparisons (Stiennon et al. 2020; Ouyang et al. 2022).

All completions of a prompt are in the same minibatch. Each goes through the model once, for all pairs that contain it.
An ensemble's members are trained side by side, each on comparisons that are drawn for it with replacement (Christiano
et al. 2017).

Papers: https://arxiv.org/abs/2009.01325 (Stiennon et al.), https://arxiv.org/abs/2203.02155 (Ouyang et al.),
https://arxiv.org/abs/1706.03741 (Christiano et al.).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from agents import functional as F
from agents.learner import STEP_METRICS, Learner
from agents.training import require
from lmgym.models import Example
from lmgym.preferences import Comparison
from lmgym.reward import RewardEnsemble, RewardModel, read_text

Loss = Literal["pairs", "choice"]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Config:
    """Reward modelling's own settings."""

    epochs: int = 1
    """Passes over the comparisons."""
    minibatch_prompts: int = 16
    """Comparisons (prompts) per optimizer step."""
    loss: Loss = "pairs"
    """"pairs": all pairs of a ranking (Ouyang et al. 2022). "choice": the best one against all others together (Ziegler
    et al. 2019, best of four); the order of the others is not used."""
    error_rate: float = 0.0
    """Probability that the label of a pair is wrong, if it is known (Christiano et al. 2017: 0.05); for "pairs"."""

    def __post_init__(self) -> None:
        require.in_range(self, "epochs", "minibatch_prompts", least=1)
        require.one_of("loss", self.loss, get_args(Loss))
        require.in_range(self, "error_rate", least=0.0, below=0.5)
        if self.error_rate and self.loss == "choice":
            raise ValueError(f"error_rate={self.error_rate} is that of a pair: use loss='pairs', or error_rate=0")


METRICS = {
    "loss/train": "−log σ(score of the better − score of the worse), mean over the minibatch's prompts",
    "accuracy/train": "share of pairs whose scores agree with the label, before the step",
    "accuracy/test": "the same on held-out comparisons",
    "calibration/ece": "expected calibration error of σ(score difference) on held-out comparisons, 10 bins",
} | STEP_METRICS


def scores_of(model: RewardModel | RewardEnsemble, comparisons: Sequence[Comparison]) -> list[Tensor]:
    """The scores of each comparison's K completions, [K] each, with gradients."""
    texts = [read_text(c.as_prompt, text) for c in comparisons for text in c.ranked]
    scores = model.raw_scores(texts, [True] * len(texts), rows=16)
    return list(scores.split([len(c.ranked) for c in comparisons]))


def comparison_loss(scores: Float[Tensor, " K"], comparison: Comparison, config: Config) -> Float[Tensor, ""]:
    """The loss of a ranking; of a tie, its mean over the order and the reverse: the cross-entropy with target ½."""

    def of(ranking: Tensor) -> Tensor:
        return F.choice_loss(ranking) if config.loss == "choice" else F.ranking_loss(ranking, config.error_rate)

    return (of(scores) + of(scores.flip(0))) / 2 if comparison.is_tie else of(scores)


def margins_of(scores: Sequence[Tensor]) -> Tensor:
    """The score of the better (by label) minus that of the worse, for all pairs of all rankings."""
    return torch.cat([(s[:, None] - s[None])[tuple(torch.triu_indices(len(s), len(s), 1))] for s in scores])


@torch.no_grad()
def evaluate(model: RewardModel | RewardEnsemble, comparisons: Sequence[Comparison]) -> dict[str, float]:
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
    model: RewardModel | RewardEnsemble,
    comparisons: Sequence[Comparison],
    held_out: Sequence[Comparison],
    learner: Learner,
    config: Config,
) -> Iterator[dict[str, float]]:
    """Trains on the comparisons; yields `METRICS` after each step. Held-out metrics are in the last step only.

    Of an ensemble, every step trains all members, each on a minibatch of its own draw; the norm that the learner clips
    is that of all members together.
    """
    if not comparisons:
        raise ValueError("there are no comparisons to train a reward model on")
    members = model.members if isinstance(model, RewardEnsemble) else (model,)
    drawn = [comparisons]
    if isinstance(model, RewardEnsemble):
        drawn = [bootstrap(comparisons, learner.seed, member) for member in range(len(members))]
    steps = config.epochs * -(-len(comparisons) // config.minibatch_prompts)

    def loss(part: Sequence[tuple[int, Comparison]]) -> Tensor:
        """The loss of each comparison of each member."""
        own = [[comparison for member, comparison in part if member == index] for index in range(len(members))]
        scores = [s for member, some in zip(members, own, strict=True) if some for s in scores_of(member, some)]
        loss = torch.stack([comparison_loss(s, c, config) for s, (_, c) in zip(scores, part, strict=True)])
        learner.metrics.add("loss/train", loss)
        decided = [s for s, (_, c) in zip(scores, part, strict=True) if not c.is_tie]
        if decided:
            learner.metrics.add("accuracy/train", (margins_of(decided) > 0).float())
        return loss

    def length(item: tuple[int, Comparison]) -> int:
        return members[0].count_tokens([read_text(item[1].as_prompt, text) for text in item[1].ranked])

    for step, indices in learner.shuffled_minibatches(len(comparisons), config.minibatch_prompts, config.epochs):
        minibatch = [(member, drawn[member][i]) for member in range(len(members)) for i in indices.tolist()]
        count = len(indices)
        learner.minimise(
            minibatch, lambda part, n=count: loss(part).sum() / n, lambda item: repr(item[1]),
            model=members[0], tokens=length,
        )  # fmt: skip
        yield learner.drain() | (evaluate(model, held_out) if held_out and step + 1 == steps else {})


def bootstrap(items: Sequence[Item], seed: int, member: int) -> list[Item]:
    """As many items (comparisons), drawn with replacement: what one member of an ensemble is trained on.

    Christiano et al. 2017, section 2.2.3 (https://arxiv.org/abs/1706.03741). Every member has its own draw.

    Args:
        items: what is drawn from.
        seed: of the ensemble.
        member: its index.
    """
    rng = np.random.default_rng(np.random.SeedSequence((seed, 3, member)))
    return [items[i] for i in rng.integers(len(items), size=len(items))]


@torch.no_grad()
def normalise(
    model: RewardModel | RewardEnsemble, texts: Sequence[str | Example], finished: Sequence[bool] | None = None
) -> None:
    """Scales and shifts the scores, so that those of `texts` have mean 0 and standard deviation 1.

    Of an ensemble, the scores of each member (Christiano et al. 2017); their mean then has a smaller deviation than 1.

    Ziegler et al. 2019, section 2.1 (https://arxiv.org/abs/1909.08593). The texts should be samples of the initial
    policy. The scale is multiplied into the head's weights; the shift is the attribute `shift` of the model.

    Raises:
        ValueError: all scores are equal.
    """
    if isinstance(model, RewardEnsemble):
        for member in model.members:
            normalise(member, texts, finished)
        return
    spread = float(model.score_texts(texts, finished).std())
    if not spread > 0:
        raise ValueError(
            f"the reward model gives all {len(texts)} texts the same score, so it has learned nothing: check its "
            "training data"
        )
    model.scale(1 / spread)
    model.shift = float(model.score_texts(texts, finished).mean())
