"""The reward, `score · [token is last] − β · KL`: its KL forms, KL estimators, β controllers, and composed scores."""

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lmgym.plain import quoted
from lmgym.tasks.base import Completion, Prompt, ScoreFunction

MOST = torch.finfo(torch.float32).max
"""The largest score: rewards are float32."""
KLForm = Literal["reference", "sampled", "none"]
KLEstimator = Literal["k1", "k2", "k3"]

# Total variation from the optimum π_ref·exp(score/β) at which exact gradient ascent ends, on a small bandit, when the
# estimator stands in the reward. k1 ends at 0.
_WRONG_IN_REWARD = {"k2": 0.247, "k3": 0.755}
# The same where it stands in the loss. k2 ends at 0, and so does k3 times the probability ratio.
_WRONG_IN_LOSS = {"k1": 0.714, "k3": 0.382}
_RIGHT_IN_LOSS = ("k2", "ratio_k3")


def check_reward_estimator(estimator: str) -> None:
    """Refuses KL estimators whose optimum, placed in the reward, is not `π_ref · exp(score/β)`.

    Raises:
        ValueError: for anything but k1.
    """
    if estimator in _WRONG_IN_REWARD:
        raise ValueError(
            f"kl_estimator={estimator!r} in the reward optimises something else than score − β·KL: on a bandit it ends "
            f"{_WRONG_IN_REWARD[estimator]} in total variation from the optimum, k1 ends at 0. Use k1; {estimator} is "
            "for reporting (lmgym.reward.kl_estimates)"
        )
    if estimator != "k1":
        raise ValueError(f"kl_estimator={estimator!r} is unknown: in the reward only 'k1' is right")


def check_loss_estimator(estimator: str) -> None:
    """Refuses KL estimators whose gradient, as a loss on the policy's own actions, is not that of β·KL(π ‖ π_ref).

    Raises:
        ValueError: for anything but "k2" and "ratio_k3".
    """
    if estimator in _WRONG_IN_LOSS:
        why = "its gradient is 0 on average" if estimator == "k1" else "its gradient is that of KL(π_ref ‖ π)"
        raise ValueError(
            f"kl_loss={estimator!r} optimises something else than score − β·KL ({why}): on a bandit it ends "
            f"{_WRONG_IN_LOSS[estimator]} in total variation from the optimum, 'k2' and 'ratio_k3' end at 0. Use one "
            "of those, or pay KL in the reward: kl_loss='none' and an environment with kl='sampled'"
        )
    if estimator not in _RIGHT_IN_LOSS:
        raise ValueError(f"kl_loss={estimator!r} is unknown: choose 'none', 'k2' or 'ratio_k3'")


def kl_reward(
    form: KLForm, beta: float, logp: Float[Tensor, "*shape"] | None, reference_logp: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The KL part of a token's reward: `−β (log π − log π_ref)`, or the half of it that an environment can know.

    Args:
        form: "sampled" pays all of it, with k1 (Ziegler et al. 2019, eq. 2); "reference" pays `β log π_ref`, and leaves
            the entropy bonus `−β log π` to the agent; "none" pays nothing.
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
    """Per-token estimates of KL(π ‖ π_ref) in nats from tokens drawn from π (Schulman 2020), for reporting.

    k1 and k3 are unbiased, k2 is not; k3 is never negative but varies more than k1 far from the reference.
    """
    log_ratio = logp - reference_logp
    return {"k1": log_ratio, "k2": log_ratio.square() / 2, "k3": torch.expm1(-log_ratio) + log_ratio}


def exact_kl(log_probs: Float[Tensor, "*shape V"], reference_log_probs: Float[Tensor, "*shape V"]) -> Tensor:
    """KL(π ‖ π_ref) in nats over the whole vocabulary; banned tokens (log-probability −∞ under π) count as 0."""
    probs = log_probs.exp()
    return torch.where(probs > 0, probs * (log_probs - reference_log_probs), 0.0).sum(-1)


@runtime_checkable
class KLController(Protocol):
    """Gives β, in score per nat, and may move it after each update."""

    beta: float

    def update(self, kl_nats_per_sequence: float, sequences: int) -> None: ...


@dataclass
class FixedKL:
    """A β that stays."""

    beta: float = 0.05

    def __post_init__(self) -> None:
        _check_beta(self.beta)

    def update(self, kl_nats_per_sequence: float, sequences: int) -> None:
        pass


@dataclass
class AdaptiveKL:
    """A β that is steered so that KL reaches a target: `β ← β (1 + clip(KL/target − 1, ±0.2) · n / horizon)`.

    Ziegler et al. 2019, section 2.2, in the form of their code.

    Attributes:
        beta: the starting β, in score per nat.
        target_nats_per_sequence: the KL to hold, summed over the tokens of a completion. It is not a mean per token.
        horizon: how many sequences it takes for β to move by the clipped error once.
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
        error = min(max(kl_nats_per_sequence / self.target_nats_per_sequence - 1, -0.2), 0.2)
        self.beta *= 1 + error * sequences / self.horizon


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta={beta} must be 0 or more: it is the price of a nat of KL, in units of the score")


class ScoreError(ValueError):
    """A score function failed, or gave something that is no score.

    Attributes:
        name: the component's.
        prompt: the text at fault, as far as it is known.
        completion: what followed it.
    """

    def __init__(self, message: str, name: str, prompt: str = "", completion: str = ""):
        super().__init__(message)
        self.name, self.prompt, self.completion = name, prompt, completion


class Score:
    """A weighted sum of named score functions, and the breakdown.

    Args:
        components: for each name a score function, or a pair (weight, score function).
        shift: a constant taken off the sum, such as the mean score of the starting policy.
        finite: whether a score that is not finite raises; False passes it on, for a learner that skips such steps.

    Example:
        `Score({"reward_model": reward_model, "brevity": (-0.01, count_words)})`
    """

    def __init__(
        self,
        components: Mapping[str, ScoreFunction | tuple[float, ScoreFunction]],
        shift: float = 0.0,
        finite: bool = True,
    ):
        if not components:
            raise ValueError("a Score needs at least one component: Score({'name': function})")
        self.components = {
            name: component if isinstance(component, tuple) else (1.0, component)
            for name, component in components.items()
        }
        self.shift = shift
        self.finite = finite

    def __deepcopy__(self, memo: dict[int, Any]) -> "Score":
        # gymnasium's env.spec deep-copies every argument of make(); a reward model inside must not be copied.
        return self

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.components)

    def breakdown(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, list[float]]:
        """The unweighted score of each completion under each component.

        Raises:
            ScoreError: a component raises, or returns the wrong number of scores, or one that is not finite; it names
                the component and the text.
        """
        return {
            name: _checked(name, _call(name, function, prompts, completions), prompts, completions, self.finite)
            for name, (_, function) in self.components.items()
        }

    def total(self, breakdown: Mapping[str, Sequence[float]]) -> list[float]:
        """The weighted sums of what `breakdown` gave."""
        columns = [[weight * s for s in breakdown[name]] for name, (weight, _) in self.components.items()]
        totals = [_sum(row) - self.shift for row in zip(*columns, strict=True)]
        if self.finite and not all(abs(total) <= MOST for total in totals):
            raise ValueError(f"the weighted sum of the scores {', '.join(self.names)} is not finite: lower the weights")
        return totals

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return self.total(self.breakdown(prompts, completions))


def _call(name: str, function: ScoreFunction, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Any:
    try:
        return function(prompts, completions)
    except (ScoreError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        said = f"the score {name!r} raised {type(error).__name__}: {error} ({Path(at.filename).name}, line {at.lineno})"
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                function([prompt], [completion])
            except Exception:  # the same, one would think
                text = f"for the completion {completion.text!r} of the prompt {prompt.text!r} (row {row})"
                raise ScoreError(f"{said} {text}", name, prompt.text, completion.text) from error
        raise ScoreError(f"{said}, but for none of the {len(completions)} completions alone", name) from error


def _sum(numbers: Sequence[float]) -> float:
    try:
        return math.fsum(numbers)
    except (OverflowError, ValueError):  # beyond the floats, or ∞ − ∞
        return sum(numbers)


def _checked(
    name: str, scores: Any, prompts: Sequence[Prompt], completions: Sequence[Completion], finite: bool
) -> list[float]:
    try:
        # One more than is wanted, and no further: it may never end.
        values = [float(s) for s in islice(scores, len(completions) + 1)]
    except (TypeError, ValueError, OverflowError):
        message = f"the score {name!r} must return one number per completion, not {quoted(scores)}"
        raise ScoreError(message, name) from None
    if len(values) != len(completions):
        count = f"{len(values)}" if len(values) < len(completions) else "more"
        raise ScoreError(
            f"the score {name!r} returned {count} numbers for {len(completions)} completions; it must return one for "
            "each, in order",
            name,
        )
    for row, (value, prompt, completion) in enumerate(zip(values, prompts, completions, strict=True)):
        if finite and not abs(value) <= MOST:
            raise ScoreError(
                f"the score {name!r} returned {value} for the completion {completion.text!r} of the prompt "
                f"{prompt.text!r} (row {row}); scores must be finite, in float32",
                name,
                prompt.text,
                completion.text,
            )
    return values
