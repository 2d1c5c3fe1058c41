"""A world where every optimum is known: texts are T tokens, drawn independently from the policy's distribution.

Only how often each token occurs counts, so a text is a vector of V counts. A reward that is linear in the counts has
the optimal policy π*(v) ∝ π_ref(v) exp(w_v / β) (Ziegler et al. 2019, eq. 3, https://arxiv.org/abs/1909.08593), token
by token, and KL(π* ‖ π_ref) is T times that of one token. The gold score adds up a value of each count, and its mean
under any policy follows from the binomial distribution. So nothing but the reward model is learned, and nothing but the
texts and labels is random: policies are exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import gammaln, rel_entr, softmax, xlog1py, xlogy
from scipy.stats import spearmanr

from agents import functional as F
from agents.experiments.statistics import Numbers
from agents.experiments.win_rates import Values
from lmgym.preferences import SimulatedAnnotator

Counts = Int[ndarray, "N V"]
Weights = Float[ndarray, " V"]
Policies = Float[ndarray, "*points V"]
"""The probability of each token: of one policy, or of several."""


@dataclass(frozen=True)
class TokenWorld:
    """Reference policy and gold score.

    Attributes:
        reference: [V] π_ref.
        worth: [V] gold score of one token, while it is not repeated too often.
        length: T, tokens of a text.
        tiring: gold score that each further repetition costs, once a token has occurred `often` times.
        often: how often a token can occur without loss.
    """

    reference: Weights
    worth: Weights
    length: int = 24
    tiring: float = 0.0
    often: int = 3

    @classmethod
    def draw(
        cls, rng: np.random.Generator, vocabulary: int = 16, length: int = 24, tiring: float = 0.0
    ) -> "TokenWorld":
        """A world with random worths, N(0, 0.35²), and a reference that is uneven."""
        logits = rng.normal(0, 0.5, vocabulary)
        reference = np.exp(logits) / np.exp(logits).sum()
        worth = rng.normal(0, 0.35, vocabulary)
        return cls(reference, worth - worth @ reference, length, tiring)

    def values(self) -> Float[ndarray, "V C"]:
        """The gold score of each token by its count 0 … T."""
        count = np.arange(self.length + 1)
        return self.worth[:, None] * count - self.tiring * np.maximum(0, count - self.often)

    def sample(self, rng: np.random.Generator, policy: Weights, texts: int) -> Counts:
        """Texts of a policy."""
        return rng.multinomial(self.length, policy, texts)

    def pairs(self, rng: np.random.Generator, policy: Weights, count: int) -> tuple[Counts, Counts]:
        """Pairs of texts of a policy: all first ones, and all second ones."""
        return self.sample(rng, policy, count), self.sample(rng, policy, count)

    def gold(self, counts: Counts) -> Float[ndarray, " N"]:
        """The gold score of texts."""
        return np.take_along_axis(self.values().T, counts, 0).sum(1)

    def expected_gold(self, policy: Policies) -> Float[ndarray, "*points"]:
        """The exact mean of the gold score over a policy's texts, less that of the reference."""
        count = np.arange(self.length + 1)
        ways = gammaln(self.length + 1) - gammaln(count + 1) - gammaln(self.length - count + 1)

        def mean(p: Policies) -> Float[ndarray, "*points"]:
            p = p[..., None]
            chance = np.exp(ways + xlogy(count, p) + xlog1py(self.length - count, -p))  # binomial
            return np.asarray((chance * self.values()).sum((-1, -2)))

        return np.asarray(mean(policy) - mean(self.reference))

    def expected(self, weights: Weights, policy: Policies) -> Float[ndarray, "*points"]:
        """The exact mean of a linear score, less that of the reference."""
        return np.asarray(self.length * (policy - self.reference) @ weights)

    def kl(self, policy: Policies) -> Float[ndarray, "*points"]:
        """KL(π ‖ π_ref) of a text, in nats."""
        return np.asarray(self.length * rel_entr(policy, self.reference).sum(-1))

    def optimum(self, weights: Weights, beta: Numbers) -> Policies:
        """The policy that maximises a linear score less β · KL; one for each β."""
        return softmax(np.log(self.reference) + weights / np.asarray(beta)[..., None], axis=-1)

    def optimum_at(self, weights: Weights, nats: float) -> Weights:
        """The same, with the β whose KL has this many nats; the nearest policy, if the score cannot lead so far."""

        def excess(log_beta: float) -> float:
            return float(self.kl(self.optimum(weights, float(np.exp(log_beta)))) - nats)

        low, high = -9.0, 9.0
        log_beta = cast(float, brentq(excess, low, high)) if excess(low) > 0 else low
        return self.optimum(weights, float(np.exp(log_beta)))

    def frontier(self, weights: Weights, nats: Float[ndarray, " points"]) -> Policies:
        """The optima at increasing KL, in nats."""
        betas = np.exp(np.linspace(9.0, -9.0, 2000))
        kl = self.kl(self.optimum(weights, betas))
        return self.optimum(weights, np.exp(np.interp(nats, kl, np.log(betas))))

    def compare(
        self, rng: np.random.Generator, first: Counts, second: Counts, annotator: SimulatedAnnotator
    ) -> tuple[Counts, Counts]:
        """The preferred text of each pair, and the other one."""
        golds = zip(self.gold(first), self.gold(second), strict=True)
        chance = np.array([annotator.prefers(a, b) for a, b in golds])
        wins = (rng.random(len(chance)) < chance)[:, None]
        return np.where(wins, first, second), np.where(wins, second, first)


def fit(better: Counts, worse: Counts, error_rate: float = 0.0, l2: float = 1e-3) -> Weights:
    """The linear score of the largest likelihood: the loss of `agents.reward_modelling`, of a linear reward model.

    Args:
        better, worse: the counts of the preferred texts and of the others.
        error_rate: of the labels, as the likelihood takes it.
        l2: penalty on the squared weights, which a constant shift of all tokens' weights does not change otherwise.
    """
    difference = torch.tensor(better - worse, dtype=torch.float64)
    weights = torch.zeros(difference.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        margin = difference @ weights
        loss = F.bradley_terry(margin, torch.zeros_like(margin), error_rate=error_rate) + l2 * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # pyright: ignore[reportArgumentType] (a tensor is a number here)
    return weights.detach().numpy()


def spearman(x: Values, y: Values) -> float:
    """The rank correlation (Spearman 1904); 0 if one of the two is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return 0.0
    return float(cast(Any, spearmanr(x, y)).statistic)


def collected(
    world: TokenWorld, rng: np.random.Generator, labels: Sequence[int], nats: float, online: bool
) -> list[float]:
    """Gold score of the optimum at the same KL after each round of comparisons, one reward model for all so far.

    Args:
        world: reference and gold.
        rng: of texts and labels.
        labels: comparisons of each round.
        nats: KL of the policy.
        online: compares texts of the latest policy, and not of the reference.
    """
    policy, golds = world.reference, []
    better, worse = (np.zeros((0, len(world.worth)), dtype=np.int64) for _ in range(2))
    for count in labels:
        texts = world.pairs(rng, policy, count)
        one, other = world.compare(rng, *texts, SimulatedAnnotator(0.0, scale=1.0))
        better, worse = np.concatenate([better, one]), np.concatenate([worse, other])
        learned = world.optimum_at(fit(better, worse), nats)
        policy = learned if online else world.reference
        golds.append(float(world.expected_gold(learned)))
    return golds


def points(x: Any, y: Any) -> list[list[float]]:
    """A curve, as JSON data."""
    return [[float(a), float(b)] for a, b in zip(x, y, strict=True)]
