"""The KL part of the reward, `−β · KL`: its forms, its estimators, and controllers of β.

Papers: Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) for the penalty and its adaptive coefficient, Schulman
2020 (http://joschu.net/blog/kl-approx.html) for the estimators k1, k2 and k3.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

KLForm = Literal["reference", "sampled", "none"]
KLEstimator = Literal["k1", "k2", "k3"]

# Total variation from the optimum π_ref·exp(score/β) at which exact gradient ascent ends, on a small bandit, if the
# estimator is used in the reward. k1 ends at 0.
_WRONG_IN_REWARD = {"k2": 0.247, "k3": 0.755}
# The same for estimators in the loss. k2 ends at 0, and so does k3 times the probability ratio.
_WRONG_IN_LOSS = {"k1": 0.714, "k3": 0.382}
_RIGHT_IN_LOSS = ("k2", "ratio_k3")


def check_reward_estimator(estimator: str) -> None:
    """Refuses KL estimators with which the optimum of the reward is not `π_ref · exp(score/β)`.

    Raises:
        ValueError: the estimator is not k1.
    """
    if estimator in _WRONG_IN_REWARD:
        raise ValueError(
            f"kl_estimator={estimator!r} in the reward does not optimise score − β·KL: on a bandit it ends "
            f"{_WRONG_IN_REWARD[estimator]} in total variation from the optimum, k1 ends at 0. Use k1; use {estimator} "
            "for reporting only (lmgym.reward.kl_estimates)"
        )
    if estimator != "k1":
        raise ValueError(f"kl_estimator={estimator!r} is unknown: the reward takes only 'k1'")


def check_loss_estimator(estimator: str) -> None:
    """Refuses KL estimators whose gradient, as a loss on the policy's own actions, is not that of β·KL(π ‖ π_ref).

    Raises:
        ValueError: the estimator is neither "k2" nor "ratio_k3".
    """
    if estimator in _WRONG_IN_LOSS:
        why = "its gradient is 0 on average" if estimator == "k1" else "its gradient is that of KL(π_ref ‖ π)"
        raise ValueError(
            f"kl_loss={estimator!r} does not optimise score − β·KL ({why}): on a bandit it ends "
            f"{_WRONG_IN_LOSS[estimator]} in total variation from the optimum, 'k2' and 'ratio_k3' end at 0. Use one "
            "of those, or pay KL in the reward: kl_loss='none' and an environment with kl='sampled'"
        )
    if estimator not in _RIGHT_IN_LOSS:
        raise ValueError(f"kl_loss={estimator!r} is unknown: choose 'none', 'k2' or 'ratio_k3'")


def kl_reward(
    form: KLForm, beta: float, logp: Float[Tensor, "*shape"] | None, reference_logp: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The KL part of a token's reward: `−β (log π − log π_ref)`, or the term of it that does not depend on the policy.

    Ziegler et al. 2019, eq. 2 (https://arxiv.org/abs/1909.08593).

    Args:
        form: "sampled" pays both terms (the estimator k1); "reference" pays `β log π_ref`, and leaves the entropy bonus
            `−β log π` to the agent; "none" pays nothing.
        beta: β, in score per nat.
        logp: log π of the tokens under the policy that chose them, in nats.
        reference_logp: log π_ref of the same tokens, in nats.

    Raises:
        ValueError: form "sampled" without `logp`.
    """
    match form:
        case "none":
            return torch.zeros_like(reference_logp)
        case "reference":
            return beta * reference_logp
        case "sampled":
            if logp is None:
                raise ValueError(
                    "kl='sampled' pays −β (log π − log π_ref) and needs the policy's log-probability of each token: "
                    "step with TokenAction(token, logp), or bind a policy with env.bind(policy), or make the "
                    "environment with kl='reference' or kl='none'"
                )
            return -beta * (logp - reference_logp)
    raise ValueError(f"kl={form!r} is unknown: choose 'reference', 'sampled' or 'none'")


def kl_estimates(logp: Float[Tensor, "*shape"], reference_logp: Float[Tensor, "*shape"]) -> dict[str, Tensor]:
    """Per-token estimates of KL(π ‖ π_ref) in nats from tokens drawn from π, for reporting.

    With r = log π − log π_ref: k1 = r, k2 = r² / 2, k3 = exp(−r) − 1 + r (Schulman 2020,
    http://joschu.net/blog/kl-approx.html). k1 and k3 are unbiased, k2 is not. k3 is never negative, but far from the
    reference it has a larger variance than k1.
    """
    log_ratio = logp - reference_logp
    return {"k1": log_ratio, "k2": log_ratio.square() / 2, "k3": torch.expm1(-log_ratio) + log_ratio}


def exact_kl(log_probs: Float[Tensor, "*shape V"], reference_log_probs: Float[Tensor, "*shape V"]) -> Tensor:
    """KL(π ‖ π_ref) = Σ π (log π − log π_ref) in nats over the vocabulary; banned tokens (log π = −∞) contribute 0."""
    probs = log_probs.exp()
    return torch.where(probs > 0, probs * (log_probs - reference_log_probs), 0.0).sum(-1)


@runtime_checkable
class KLController(Protocol):
    """Gives β, in score per nat, and may change it after each update."""

    beta: float

    def update(self, kl_nats_per_sequence: float, sequences: int) -> None: ...


@dataclass
class FixedKL:
    """A constant β."""

    beta: float = 0.05

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def update(self, kl_nats_per_sequence: float, sequences: int) -> None:
        pass


@dataclass
class AdaptiveKL:
    """A β that is adapted so that KL reaches a target: `β ← β (1 + clip(KL/target − 1, ±0.2) · n / horizon)`.

    Ziegler et al. 2019, section 2.2 (https://arxiv.org/abs/1909.08593), as in the code that they published.

    Attributes:
        beta: the initial β, in score per nat; then the current one.
        target_nats_per_sequence: the target KL, summed over the tokens of a completion. It is not a mean per token.
        horizon: after this many sequences, β has changed once by the clipped relative error.
    """

    beta: float = 0.2
    target_nats_per_sequence: float = 6.0
    horizon: float = 10_000

    def __post_init__(self) -> None:
        _check_beta(self.beta)
        if not (self.target_nats_per_sequence > 0 and self.horizon > 0):
            raise ValueError(
                f"target_nats_per_sequence={self.target_nats_per_sequence} and horizon={self.horizon} must be positive"
            )

    def update(self, kl_nats_per_sequence: float, sequences: int) -> None:
        if not math.isfinite(kl_nats_per_sequence):
            return  # a rollout with a broken row says nothing about KL
        error = min(max(kl_nats_per_sequence / self.target_nats_per_sequence - 1, -0.2), 0.2)
        self.beta *= 1 + error * sequences / self.horizon


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta={beta} must be 0 or more and finite: it is the cost of a nat of KL, in units of score")
