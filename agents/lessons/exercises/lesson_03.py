"""Exercises of lesson 3: baselines and variance."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from agents.lessons.exercise import Answer, demand, exercise, expect, lengths_mask, numbers
from agents.lessons.exercises.lesson_02 import SCORES, objective_gradient


def gradient_terms(logits: Tensor) -> Tensor:
    """[V, V] the gradient of log π(a) for every token a."""
    return torch.eye(len(logits), dtype=torch.float64) - logits.softmax(0)


def mean_gradient(advantages_of: Callable[[Tensor], Tensor], logits: Tensor, scores: Tensor, group: int) -> Tensor:
    """The expected gradient of groups of samples, by enumerating every group; `advantages_of` maps [G] to [G]."""
    probs, terms = logits.softmax(0), gradient_terms(logits)
    total = torch.zeros_like(logits)
    for actions in product(range(len(logits)), repeat=group):
        chosen = torch.tensor(actions)
        advantages = torch.as_tensor(advantages_of(scores[chosen]), dtype=torch.float64)
        total += probs[chosen].prod() * (advantages[:, None] * terms[chosen]).mean(0)
    return total


@exercise(
    "3.1",
    "The leave-one-out baseline",
    "fill",
    '''
"""Exercise 3.1: the leave-one-out baseline.

Sample G completions of the same prompt, with the scores R_1 … R_G. The baseline of one completion is the mean score of
the others, so that it does not depend on the completion itself:

    A_i = R_i − (Σ_{j≠i} R_j) / (G − 1)

Write `leave_one_out`.
"""

import torch


def leave_one_out(scores):
    """[G] the advantages of a group's scores [G]; G is at least 2."""
    ...
''',
    (
        "With two completions the advantages are R_1 − R_2 and R_2 − R_1.",
        "The sum of the others is scores.sum() - scores, for all of them at once.",
        "scores - (scores.sum() - scores) / (len(scores) - 1)",
    ),
)
def leave_one_out(answer: Answer) -> None:
    """The definition in a loop; and by enumeration, that the gradient stays unbiased."""
    for scores in (numbers((2,), 1), numbers((5,), 2)):
        group = len(scores)
        wanted = [
            float(scores[i]) - sum(float(scores[j]) for j in range(group) if j != i) / (group - 1) for i in range(group)
        ]
        mistakes = {
            "Your baseline contains the completion's own score, which makes the gradient too small by (G − 1)/G": scores
            - scores.mean(),
            "You divide the sum of the others by G; there are G − 1 of them": scores - (scores.sum() - scores) / group,
            "You subtract the mean of all the scores from the mean of the others": (scores.sum() - scores) / (group - 1)
            - scores.mean(),
            "You return the baseline; subtract it from the scores": (scores.sum() - scores) / (group - 1),
        }
        expect(answer.leave_one_out(scores), wanted, f"{group} scores", mistakes)
    logits = numbers((4,), 3)
    got = mean_gradient(answer.leave_one_out, logits, SCORES, 2)
    expect(got, objective_gradient(logits, SCORES), "the expected gradient of groups of two, over all 16 pairs")


@exercise(
    "3.2",
    "A baseline that cheats",
    "mend",
    '''
"""Exercise 3.2: a baseline that cheats. This code has a bug.

A baseline may depend on anything but the action it is subtracted from: then the expected gradient does not change.
`advantages` gets the scores of a group [G] and should subtract, from each score, a baseline made of the *other* scores:
the best of the others. Find the bug and mend it.
"""

import torch


def advantages(scores):
    """[G] each score less the largest of the other scores."""
    best = scores.max()
    return scores - best
''',
    (
        "Which baseline does the best completion of the group get? Does it depend on itself?",
        "Only the baseline of the best completion is wrong: it should be the second best.",
        "Loop over i and take torch.cat([scores[:i], scores[i + 1:]]).max().",
    ),
)
def advantages(answer: Answer) -> None:
    """Enumerates all groups: the expected gradient with a lawful baseline is the exact one."""
    logits = numbers((4,), 4)
    exact = objective_gradient(logits, SCORES)
    got = mean_gradient(answer.advantages, logits, SCORES, 3)
    cheating = mean_gradient(lambda s: s - s.max(), logits, SCORES, 3)
    case = "the expected gradient of groups of three, over all 64 groups"
    own = "The baseline of the best completion is its own score: it depends on the action, and the gradient is biased"
    # Also where the answer is the mean of the group: the same fault with another number.
    average = mean_gradient(lambda s: s - s.mean(), logits, SCORES, 3)
    mistakes = {own: cheating, "The mean of the group contains the completion's own score": average}
    expect(got, exact, case, mistakes)
    scores = torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64)
    wanted = {
        "A mean of the others is unbiased too, but the task is the best of the others": scores
        - (scores.sum() - scores) / 2,
        "There is no baseline: this is unbiased too, but the task is the best of the others": scores,
    }
    expect(answer.advantages(scores), [-3.0, 1.0, -1.0], "the scores 1, 4 and 3", wanted)


@exercise(
    "3.3",
    "The best constant baseline",
    "fill",
    '''
"""Exercise 3.3: the best constant baseline.

With one sampled token a of a bandit, the estimated gradient is (s_a − b) g_a, where g_a = ∇ log π(a). Every constant b
gives the same expectation. The variance, summed over the entries, is least for

    b* = Σ_a π_a |g_a|² s_a / Σ_a π_a |g_a|²

a mean of the scores in which tokens with a large gradient count more. Write `best_baseline`.
"""

import torch


def best_baseline(logits, scores):
    """The constant b* for a policy softmax(logits) [V] and scores [V]."""
    ...
''',
    (
        "g_a is exercise 2.2: a row of the identity matrix less π.",
        "All of them at once: g = torch.eye(V) - probs, one row per token; |g_a|² = g.square().sum(1).",
        "weights = probs * g.square().sum(1); return (weights * scores).sum() / weights.sum()",
    ),
)
def best_baseline(answer: Answer) -> None:
    """The variance itself, enumerated, on a fine grid around the answer."""
    for seed in (5, 6):
        logits = numbers((4,), seed)
        probs, terms = logits.softmax(0), gradient_terms(logits)

        def variance(b: float, probs: Tensor = probs, terms: Tensor = terms) -> float:
            each = (SCORES - b)[:, None] * terms
            mean = (probs[:, None] * each).sum(0)
            return float((probs[:, None] * (each - mean).square()).sum())

        # The variance is a parabola in b: three points give its lowest point.
        left, middle, right = variance(-1.0), variance(0.0), variance(1.0)
        wanted = (left - right) / (2 * (left - 2 * middle + right))
        squares = terms.square().sum(1)
        mistakes = {
            "This is the mean score: weight each token by |g|² too": (probs * SCORES).sum(),
            "You forget to weight by the probabilities": (squares * SCORES).sum() / squares.sum(),
            "You use |g| instead of |g|²": (probs * squares.sqrt() * SCORES).sum() / (probs * squares.sqrt()).sum(),
            "You forget to divide by the sum of the weights": (probs * squares * SCORES).sum(),
        }
        expect(answer.best_baseline(logits, SCORES), wanted, "the baseline with the least variance", mistakes)


@exercise(
    "3.4",
    "Reward to go",
    "mend",
    '''
"""Exercise 3.4: reward to go. This code has a bug.

A token can only change what comes after it. So the return that belongs to the token at t is the sum of the rewards from
t on: G_t = r_t + r_{t+1} + … Find the bug in `reward_to_go` and mend it.
"""

import torch


def reward_to_go(rewards):
    """[B, T] the sum of the rewards [B, T] from each token on."""
    return rewards.cumsum(1)
''',
    (
        "What does the function give at the first token, and what should it give?",
        "cumsum adds up from the left, and the sum is needed from the right.",
        "rewards.flip(1).cumsum(1).flip(1)",
    ),
)
def reward_to_go(answer: Answer) -> None:
    """The double sum."""
    rewards = numbers((2, 5), 7)
    wanted = torch.stack([rewards[:, t:].sum(1) for t in range(5)], 1)
    mistakes = {
        "You credit a token with the rewards before it: sum from each token to the end": rewards.cumsum(1),
        "You leave out the reward of the token itself": wanted - rewards,
        "The order of the tokens is reversed: turn the result round again": rewards.flip(1).cumsum(1),
        "You give every token the whole return": rewards.sum(1, keepdim=True).expand(2, 5),
        "You sum over the rows; sum over the tokens, dimension 1": rewards.flip(0).cumsum(0).flip(0),
    }
    expect(answer.reward_to_go(rewards), wanted, "two rows of five rewards", mistakes)


@exercise(
    "3.5",
    "A mean over tokens",
    "mend",
    '''
"""Exercise 3.5: a mean over tokens. This code has a bug.

The baseline is the mean return over all tokens of a batch. Rows have different lengths, and `is_action` is True where
there is a token. Find the bug in `mean_baseline` and mend it.
"""

import torch


def mean_baseline(returns, is_action):
    """One number: the mean of returns [B, T] over the tokens where is_action [B, T] is True."""
    kept = torch.where(is_action, returns, 0.0)
    return kept.mean()
''',
    (
        "By which number does mean() divide?",
        "Divide by the number of True entries.",
        "kept.sum() / is_action.sum()",
    ),
)
def mean_baseline(answer: Answer) -> None:
    """Adds one entry after the other; what lies in the padding must not matter."""
    returns, lengths = numbers((3, 4), 8) + 2, [4, 1, 2]
    mask = lengths_mask(lengths, 4)
    spoiled = torch.where(mask, returns, 99.0)
    entries = [float(returns[row, t]) for row, length in enumerate(lengths) for t in range(length)]
    rows = [sum(float(returns[row, t]) for t in range(length)) / length for row, length in enumerate(lengths)]
    mistakes = {
        "You divide by the number of all entries; divide by the number of tokens": sum(entries) / mask.numel(),
        "You divide by the number of rows": sum(entries) / 3,
        "You take a mean per row and then over the rows: a short row's tokens then count more": sum(rows) / 3,
        "You count the padding": spoiled.mean(),
    }
    expect(answer.mean_baseline(spoiled, mask), sum(entries) / len(entries), "rows of 4, 1 and 2 tokens", mistakes)
    demand(
        bool(torch.isfinite(torch.as_tensor(answer.mean_baseline(torch.where(mask, returns, torch.inf), mask)))),
        "An infinite number in the padding spoils your mean: choose with torch.where, do not multiply by the mask.",
    )
