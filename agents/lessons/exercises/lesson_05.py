"""Exercises of lesson 5: why a KL penalty, and the exact optimum."""

import math

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from agents.lessons.exercise import Answer, demand, exercise, expect, lengths_mask, numbers, probabilities

SCORES = torch.tensor([0.0, 1.0, 0.2, 0.9, -0.5], dtype=torch.float64)


def objective(probs: Tensor, reference: Tensor, scores: Tensor, beta: float) -> float:
    """E[score] − β·KL(π ‖ π_ref), a sum over all texts."""
    return float((probs * (scores - beta * (probs / reference).log())).sum())


def best_policy(reference: Tensor, scores: Tensor, beta: float) -> Tensor:
    """The maximum of the objective, found by scipy's optimizer and not by the closed form."""

    def loss(z: np.ndarray) -> tuple[float, np.ndarray]:
        leaf = torch.from_numpy(z).requires_grad_(True)
        logp = leaf.log_softmax(0)
        value = -(logp.exp() * (scores - beta * (logp - reference.log()))).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        return float(value.detach()), gradient.numpy()

    found = minimize(loss, np.zeros(len(scores)), jac=True, method="BFGS", options={"gtol": 1e-10})
    return torch.from_numpy(found.x).softmax(0)


@exercise(
    "5.1",
    "The soft-optimal policy",
    "fill",
    '''
"""Exercise 5.1: the soft-optimal policy.

Which policy has the largest E[score] − β·KL(π ‖ π_ref)? The answer is known:

    π*(y) = π_ref(y) exp(score(y) / β) / Z

where Z makes the probabilities add up to 1. The arrays have one entry for each possible text y. Write `soft_optimal`.
It must also work for a small β such as 0.001, where exp(score(y) / β) is too large for a computer.
"""

import torch


def soft_optimal(reference, scores, beta):
    """[N] the best policy, from π_ref [N], the scores [N] and β."""
    ...
''',
    (
        "Compute the numerator for all texts at once, and divide by its sum.",
        "With a very large β the result is π_ref; with a very small one, the best text.",
        "torch.softmax(reference.log() + scores / beta, 0) does it all and cannot overflow.",
    ),
)
def soft_optimal(answer: Answer) -> None:
    """A numerical optimizer is the oracle."""
    reference = probabilities(5, 1)
    for beta in (0.3, 1.0):
        wanted = best_policy(reference, SCORES, beta)
        powers = reference * (SCORES / beta).exp()
        mistakes = {
            "You forget to divide by Z: the probabilities do not add up to 1": powers,
            "You forget the reference: this is the optimum for an even π_ref": (SCORES / beta).softmax(0),
            "You multiply by β; divide by it: a small β lets the score decide": (
                reference.log() + SCORES * beta
            ).softmax(0),
            "The sign of the score is wrong: texts with a high score become more probable": (
                reference.log() - SCORES / beta
            ).softmax(0),
        }
        expect(answer.soft_optimal(reference, SCORES, beta), wanted, f"β = {beta}", mistakes, tolerance=1e-4)
    small = torch.as_tensor(answer.soft_optimal(reference, SCORES, 0.001))
    demand(
        bool(torch.isfinite(small).all()),
        "For β = 0.001 exp(score/β) overflows: add log π_ref + score/β first, and take a softmax.",
    )


@exercise(
    "5.2",
    "The largest value of the objective",
    "fill",
    '''
"""Exercise 5.2: the largest value of the objective.

No policy can have a larger E[score] − β·KL than β log Z, where

    Z = Σ_y π_ref(y) exp(score(y) / β)

A learning curve can be drawn beside this number. Write `optimum`. It must also work for a small β such as 0.001.
"""

import torch


def optimum(reference, scores, beta):
    """One number, in units of the score: β log Z."""
    ...
''',
    (
        "For β → 0 the result is the best score; it is never above it.",
        "log Σ exp(x) of an array x is x.logsumexp(0), which cannot overflow.",
        "beta * (reference.log() + scores / beta).logsumexp(0)",
    ),
)
def optimum(answer: Answer) -> None:
    """The objective at the optimum that scipy finds."""
    reference = probabilities(5, 2)
    for beta in (0.3, 1.0):
        wanted = objective(best_policy(reference, SCORES, beta), reference, SCORES, beta)
        log_z = float((reference.log() + SCORES / beta).logsumexp(0))
        mistakes = {
            "You forget the factor β: the result is in units of the score": log_z,
            "You return Z; take β times its logarithm": math.exp(log_z),
            "You forget π_ref: Z is a mean under the reference": beta * float((SCORES / beta).logsumexp(0)),
            "This is the mean score of the best policy; the KL is still to be paid": float(
                best_policy(reference, SCORES, beta) @ SCORES
            ),
        }
        # With β = 1 some mistakes look alike, so the other one comes first.
        expect(answer.optimum(reference, SCORES, beta), wanted, f"β = {beta}", mistakes, tolerance=1e-4)
    got = torch.as_tensor(answer.optimum(reference, SCORES, 0.001))
    demand(bool(torch.isfinite(got).all()), "For β = 0.001 exp(score/β) overflows: use logsumexp.")
    demand(
        0.99 < float(got) <= 1.0, f"For β = 0.001 you return {float(got):.4f}; the best score, 1, is nearly reached."
    )


@exercise(
    "5.3",
    "Which way round?",
    "mend",
    '''
"""Exercise 5.3: which way round? This code has a bug.

The KL divergence of the policy from the reference, in nats, is

    KL(π ‖ π_ref) = Σ_y π(y) log(π(y) / π_ref(y))

It is an expectation under π: the texts come from the policy. Find the bug in `kl` and mend it.
"""

import torch


def kl(policy, reference):
    """KL(policy ‖ reference) in nats, from two arrays of probabilities [N]."""
    return (reference * torch.log(policy / reference)).sum()
''',
    (
        "A KL divergence is never negative. What does this function return?",
        "Which of the two distributions weighs the logarithm?",
        "(policy * torch.log(policy / reference)).sum()",
    ),
)
def kl(answer: Answer) -> None:
    """torch.distributions is the oracle."""
    for seed in (3, 4):
        policy, reference = probabilities(5, seed), probabilities(5, seed + 10)
        make = torch.distributions.Categorical
        wanted = torch.distributions.kl_divergence(make(probs=policy), make(probs=reference))
        other = torch.distributions.kl_divergence(make(probs=reference), make(probs=policy))
        mistakes = {
            "You weight by the reference: the expectation is under the policy": -other,
            "This is KL(π_ref ‖ π), the other way round": other,
            "The sign is wrong: a KL divergence is never negative": -wanted,
            "You measure in bits; use the natural logarithm": wanted / math.log(2),
            "You do not weight the logarithms: multiply by π": (policy / reference).log().sum(),
        }
        expect(answer.kl(policy, reference), wanted, "two distributions over five texts", mistakes)
    expect(answer.kl(policy, policy), 0.0, "two equal distributions")


@exercise(
    "5.4",
    "The reward of each token",
    "mend",
    '''
"""Exercise 5.4: the reward of each token. This code has a bug.

Every token pays −β (log π − log π_ref); the last token of a row also earns the row's score. Behind a row's last token,
where `is_action` is False, the reward is 0. Find the bug in `token_rewards` and mend it.
"""

import torch


def token_rewards(scores, logp, reference_logp, is_action, beta):
    """[B, T] rewards, from scores [B], and three arrays [B, T]."""
    rewards = -beta * (logp - reference_logp)
    rewards[:, -1] += scores
    return torch.where(is_action, rewards, 0.0)
''',
    (
        "Take a row with two tokens in a batch of width four. Where does its score go?",
        "The last token of row b is at column is_action[b].sum() - 1.",
        "rewards[torch.arange(len(scores)), is_action.sum(1) - 1] += scores",
    ),
)
def token_rewards(answer: Answer) -> None:
    """The sum over a row is score − β · its log-ratio; where the score stands is checked too."""
    lengths, beta = [4, 2, 1], 0.3
    mask = lengths_mask(lengths, 4)
    logp, reference, scores = numbers((3, 4), 5), numbers((3, 4), 6), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    penalty = torch.where(mask, -beta * (logp - reference), 0.0)
    wanted = penalty.clone()
    for row, length in enumerate(lengths):
        wanted[row, length - 1] += scores[row]
    last_column = penalty.clone()
    last_column[:, -1] += scores
    mistakes = {
        "A short row never gets its score: it belongs to the row's last token, not to the last column": torch.where(
            mask, last_column, 0.0
        ),
        "The score goes to the last column, which is padding in a short row": last_column,
        "Every token gets the score: a longer text then earns more": torch.where(mask, penalty + scores[:, None], 0.0),
        "The sign of the KL is wrong: a token pays for being more probable than under the reference": wanted
        - 2 * penalty,
        "You forget β": torch.where(mask, wanted - penalty + penalty / beta, 0.0),
    }
    got = answer.token_rewards(scores, logp, reference, mask, beta)
    expect(got, wanted, "rows of 4, 2 and 1 tokens with the scores 1, 2 and 3", mistakes)


@exercise(
    "5.5",
    "A thermostat for β",
    "mend",
    '''
"""Exercise 5.5: a thermostat for β. This code has a bug.

An adaptive controller (Ziegler et al. 2019) changes β after each rollout, so that the KL per completion approaches a
target, in nats:

    e = KL / target − 1, cut off at ±0.2
    β ← β (1 + e · completions / horizon)

If the KL is too large, β must rise. Find the bug in `next_beta` and mend it.
"""


def next_beta(beta, kl, target, completions, horizon):
    """β for the next rollout."""
    error = 1 - kl / target
    error = max(-0.2, min(0.2, error))
    return beta * (1 + error * completions / horizon)
''',
    (
        "Let the KL be twice its target. Does β rise or fall?",
        "Compare the first line with the equation.",
        "error = kl / target - 1",
    ),
)
def next_beta(answer: Answer) -> None:
    """The step of Ziegler's published constants, and the direction."""
    case = "β 0.2, KL 9, target 6, 256 completions, horizon 10,000"
    mistakes = {
        "The KL is above its target, and your β falls: a larger KL must cost more": 0.2 * (1 - 0.2 * 256 / 10_000),
        "You forget to cut the error off at ±0.2": 0.2 * (1 + 0.5 * 256 / 10_000),
        "You forget the number of completions": 0.2 * (1 + 0.2 / 10_000),
        "You do not multiply by the old β": 1 + 0.2 * 256 / 10_000,
    }
    expect(answer.next_beta(0.2, 9.0, 6.0, 256, 10_000), 0.201024, case, mistakes, tolerance=1e-8)
    expect(answer.next_beta(0.2, 6.6, 6.0, 100, 1000), 0.202, "a KL 10 % above its target", tolerance=1e-8)
    expect(answer.next_beta(0.2, 0.0, 6.0, 100, 1000), 0.196, "a KL of 0", tolerance=1e-8)


@exercise(
    "5.6",
    "An estimate that is never negative",
    "fill",
    '''
"""Exercise 5.6: an estimate that is never negative.

The KL is estimated from sampled texts, y ~ π. With r = log π(y) − log π_ref(y), the estimate r has the right mean, but
single values can be negative. Schulman's k3 has the same mean and is never negative:

    k3 = exp(−r) − 1 + r

Write `k3`.
"""

import torch


def k3(logp, reference_logp):
    """[N] the estimate for each sampled text, from log π and log π_ref [N]."""
    ...
''',
    (
        "First compute r. Which of the two log-probabilities comes first?",
        "If the two policies are equal, every estimate is 0.",
        "r = logp - reference_logp; return torch.exp(-r) - 1 + r",
    ),
)
def k3(answer: Answer) -> None:
    """Enumerates all texts: the mean under π is the KL, and no value is negative."""
    policy, reference = probabilities(6, 7), probabilities(6, 8)
    wanted = float((policy * (policy / reference).log()).sum())
    got = torch.as_tensor(answer.k3(policy.log(), reference.log()))
    demand(got.shape == policy.shape, "Return one estimate for each text, not their mean.")
    r = (policy / reference).log()
    mistakes = {
        "You return k1, which can be negative": wanted,
        "Log π and log π_ref are exchanged: r = log π − log π_ref": (policy * (r.exp() - 1 - r)).sum(),
        "You forget + r": (policy * ((-r).exp() - 1)).sum(),
        "This is k2, r²/2, whose mean is not the KL": (policy * r.square() / 2).sum(),
    }
    if float(got.min()) < 0:
        demand(not torch.allclose(got, r), "You return r itself, which is negative for some texts.")
    expect((policy * got).sum(), wanted, "the mean over all six texts under π, which must be the KL", mistakes)
    demand(float(got.min()) >= 0, f"A value is negative: {float(got.min()):.3f}.")
