"""Exercises of lesson 2: the policy gradient by hand, on a bandit of four tokens."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from agents.lessons.exercise import Answer, demand, exercise, expect, numbers

SCORES = torch.tensor([0.0, 0.3, 0.6, 1.0], dtype=torch.float64)


def objective_gradient(logits: Tensor, scores: Tensor) -> Tensor:
    """The gradient of J = Σ π_k s_k, by autograd."""
    leaf = logits.detach().clone().requires_grad_(True)
    (leaf.softmax(0) * scores).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


@exercise(
    "2.1",
    "The exact gradient of a bandit",
    "fill",
    '''
"""Exercise 2.1: the exact gradient of a bandit.

The policy has one logit z_k for each token, π = softmax(z), and token k scores s_k. The mean score is J = Σ_k π_k s_k.
Its derivative is

    ∂J/∂z_k = π_k (s_k − J)

Tokens better than the mean are pushed up, the others down. Write `exact_gradient`. Do not use autograd.
"""

import torch


def exact_gradient(logits, scores):
    """[V] the gradient of the mean score with respect to the logits [V]."""
    ...
''',
    (
        "First compute π and J.",
        "What should the entries of the gradient add up to? A shift of all logits changes nothing.",
        "probs * (scores - (probs * scores).sum())",
    ),
)
def exact_gradient(answer: Answer) -> None:
    """Autograd of the enumerated mean score is the oracle."""
    for seed, scores in ((1, SCORES), (2, SCORES - 3), (3, numbers((4,), 9))):
        logits = numbers((4,), seed)
        probs, wanted = logits.softmax(0), objective_gradient(logits, scores)
        mistakes = {
            "You forget to subtract the mean score J": probs * scores,
            "You forget the factor π_k: an improbable token moves little": scores - (probs * scores).sum(),
            "The sign is wrong: this is the gradient of a loss, and J is maximised": -wanted,
            "You subtract the plain mean of the scores; J weights them by the probabilities": probs
            * (scores - scores.mean()),
        }
        expect(
            answer.exact_gradient(logits, scores), wanted, f"scores {[round(s, 2) for s in scores.tolist()]}", mistakes
        )


@exercise(
    "2.2",
    "The score function",
    "fill",
    '''
"""Exercise 2.2: the score function.

REINFORCE needs the gradient of log π(a) with respect to the logits, which is

    ∂ log π(a) / ∂z_k = [k = a] − π_k

where [k = a] is 1 if k is the chosen token, and 0 otherwise. Write `grad_log_prob`. Do not use autograd.
"""

import torch


def grad_log_prob(logits, action):
    """[V] the gradient of log π(action) with respect to the logits [V]."""
    ...
''',
    (
        "Start from −π, and change one entry.",
        "The entry of the chosen token gets 1 more.",
        "g = -logits.softmax(0); g[action] += 1; return g",
    ),
)
def grad_log_prob(answer: Answer) -> None:
    """Autograd is the oracle."""
    for action in range(4):
        logits = numbers((4,), 4)
        leaf = logits.clone().requires_grad_(True)
        leaf.log_softmax(0)[action].backward()
        assert leaf.grad is not None
        wanted, probs = leaf.grad, logits.softmax(0)
        mistakes = {
            "This is the gradient of π(a), not of log π(a)": probs[action] * wanted,
            "The sign is wrong: the chosen token's own entry is positive": -wanted,
            "You leave out −π: the other tokens become less probable when one becomes more probable": wanted + probs,
        }
        expect(answer.grad_log_prob(logits, action), wanted, f"token {action} of 4", mistakes)


@exercise(
    "2.3",
    "The loss of REINFORCE",
    "mend",
    '''
"""Exercise 2.3: the loss of REINFORCE. This code has a bug.

The gradient of this loss must, on average over sampled tokens, be minus the gradient of the mean score: an optimizer
makes a loss smaller, and the mean score should become larger. Find the bug and mend it.
"""

import torch


def reinforce_loss(logits, actions, scores):
    """One number: the loss of sampled tokens [B] with their scores [B]; logits [V] require a gradient."""
    probs = torch.softmax(logits, 0)
    return -(scores * probs[actions]).mean()
''',
    (
        "On average over sampled tokens: a token that is drawn twice as often counts twice already.",
        "Which function of the probability did exercise 2.2 differentiate?",
        "Use torch.log_softmax instead of torch.softmax.",
    ),
)
def reinforce_loss(answer: Answer) -> None:
    """Enumerates the four tokens, so that there is no noise: the mean gradient must be the exact one."""
    logits = numbers((4,), 5)
    probs, wanted = logits.softmax(0), objective_gradient(logits, SCORES)

    def mean_of(loss_of: Callable[..., Any]) -> Tensor:
        total = torch.zeros(4, dtype=torch.float64)
        for action in range(4):
            leaf = logits.clone().requires_grad_(True)
            loss = loss_of(leaf, torch.tensor([action]), SCORES[[action]])
            demand(
                isinstance(loss, Tensor) and loss.requires_grad,
                "The loss has no gradient: compute it from `logits`, without detach(), item() or no_grad().",
            )
            demand(loss.ndim == 0, "The loss must be one number: take the mean over the tokens.")
            total -= probs[action] * torch.autograd.grad(loss, leaf)[0]
        return total

    mistakes = {
        "You differentiate the probability, and REINFORCE needs the log-probability: tokens that are drawn more often "
        "are counted twice": mean_of(lambda z, a, s: -(s * z.softmax(0)[a]).mean()),
        "The sign is wrong: the optimizer would make the mean score smaller": -wanted,
        "You use the logit itself; it must be normalised to a log-probability": mean_of(
            lambda z, a, s: -(s * z[a]).mean()
        ),
    }
    expect(mean_of(answer.reinforce_loss), wanted, "the mean gradient over all four tokens", mistakes)
    actions = torch.tensor([0, 3])
    each = sum(answer.reinforce_loss(logits, a[None], SCORES[a[None]]) for a in actions)
    summed = {"You sum over the tokens; take the mean, or the step grows with the batch": each}
    expect(answer.reinforce_loss(logits, actions, SCORES[actions]), each / 2, "two tokens", summed)


@exercise(
    "2.4",
    "Gradient ascent",
    "mend",
    '''
"""Exercise 2.4: gradient ascent. This code has a bug.

`train` makes `steps` steps of plain gradient ascent on the exact mean score of a bandit, and returns the final logits.
Each step should add lr times the gradient at the present logits. Find the bug and mend it.
"""

import torch


def train(logits, scores, lr, steps):
    """[V] the logits after `steps` steps of gradient ascent on Σ π_k s_k."""
    z = logits.clone().requires_grad_(True)
    for _ in range(steps):
        mean_score = (torch.softmax(z, 0) * scores).sum()
        mean_score.backward()
        with torch.no_grad():
            z += lr * z.grad
    return z.detach()
''',
    (
        "Print z.grad in every step, and compare it with exercise 2.1.",
        "backward() adds to z.grad. What was there before?",
        "Set z.grad = None after each step, or before each backward().",
    ),
)
def train(answer: Answer) -> None:
    """The closed-form gradient of exercise 2.1, step by step; no autograd."""

    def path(steps: int, keep: float, sign: float = 1.0, lr: float = 0.5) -> Tensor:
        z, kept = start.clone(), torch.zeros(4, dtype=torch.float64)
        for _ in range(steps):
            probs = z.softmax(0)
            kept = keep * kept + probs * (SCORES - (probs * SCORES).sum())
            z = z + sign * lr * kept
        return z

    start = numbers((4,), 6)
    for steps in (1, 2, 10):
        mistakes = {
            "backward() adds to the gradient that is there already: set z.grad to None in each step": path(steps, 1.0),
            "You go downhill: add lr times the gradient to raise the mean score": path(steps, 0.0, -1.0),
            "You make one step too many": path(steps + 1, 0.0),
        }
        expect(answer.train(start, SCORES, 0.5, steps), path(steps, 0.0), f"{steps} steps with lr 0.5", mistakes)
