"""Exercises of lesson 7: groups, RLOO and GRPO."""

import statistics
from itertools import product

import torch

from agents.lessons.exercise import Answer, demand, exercise, expect, lengths_mask, numbers, probabilities


@exercise(
    "7.1",
    "GRPO's advantage",
    "fill",
    '''
"""Exercise 7.1: GRPO's advantage.

GRPO compares the G completions of one prompt. The advantage of a completion is its score less the group's mean, divided
by the group's standard deviation:

    A_i = (R_i − mean) / (std + 0.0001)

Use torch's std. If all scores are equal, every advantage is 0. Write `group_advantages` for one group.
"""

import torch


def group_advantages(scores):
    """[G] the advantages of the scores [G]."""
    ...
''',
    (
        "Do it in two steps: centre, then divide.",
        "The small number keeps a group of equal scores from dividing 0 by 0.",
        "(scores - scores.mean()) / (scores.std() + 1e-4)",
    ),
)
def group_advantages(answer: Answer) -> None:
    """Python's statistics module is the oracle."""
    for scores in ([1.0, 0.0, 0.0, 0.0], [0.2, 0.9, 0.4, 0.4, -1.0]):
        mean, deviation = statistics.mean(scores), statistics.stdev(scores)
        wanted = [(s - mean) / (deviation + 1e-4) for s in scores]
        mistakes = {
            "You do not divide by the standard deviation (that is Dr. GRPO)": [s - mean for s in scores],
            "You do not subtract the mean": [s / (deviation + 1e-4) for s in scores],
            "You divide by the variance; divide by its square root": [
                (s - mean) / (statistics.variance(scores) + 1e-4) for s in scores
            ],
            "You leave out the 0.0001": [(s - mean) / deviation for s in scores],
        }
        got = answer.group_advantages(torch.tensor(scores, dtype=torch.float64))
        expect(got, wanted, f"the scores {scores}", mistakes, tolerance=1e-6)
    equal = torch.as_tensor(answer.group_advantages(torch.full((4,), 0.7, dtype=torch.float64)))
    demand(bool(torch.isfinite(equal).all()), "For four equal scores you divide 0 by 0: add 0.0001 to the deviation.")
    expect(equal, [0.0] * 4, "four equal scores")


@exercise(
    "7.2",
    "Neighbours and strangers",
    "mend",
    '''
"""Exercise 7.2: neighbours and strangers. This code has a bug.

A rollout has several prompts, with G completions each. The completions of a prompt are adjacent: with G = 2 the order
is prompt 0, prompt 0, prompt 1, … Each score must be compared with the mean of its own group. Find the bug
and mend it.
"""

import torch


def centred(scores, group):
    """[B] the scores [B], less the mean of their group of `group` adjacent scores."""
    table = scores.view(group, -1)
    return (table - table.mean(0)).flatten()
''',
    (
        "Write down torch.arange(6).view(2, 3) and .view(3, 2). Which rows are neighbours?",
        "One row of the table should be one group.",
        "table = scores.view(-1, group); table - table.mean(1, keepdim=True)",
    ),
)
def centred(answer: Answer) -> None:
    """A loop over the prompts."""
    for groups, group in ((3, 2), (2, 4)):
        scores = numbers((groups * group,), groups) + torch.arange(groups * group) // group * 10.0
        each = scores.tolist()
        wanted = [s - sum(each[i // group * group :][:group]) / group for i, s in enumerate(each)]
        table = scores.view(group, -1)
        mistakes = {
            "You compare completions of different prompts: the rows of a group are adjacent": (
                table - table.mean(0)
            ).flatten(),
            "You compare with the mean of the whole rollout": scores - scores.mean(),
        }
        expect(answer.centred(scores, group), wanted, f"{groups} prompts with {group} completions each", mistakes)
    one = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    expect(answer.centred(one, 3), [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0], "the scores 1 2 3 and 5 5 5")


@exercise(
    "7.3",
    "The weight of a long text",
    "mend",
    '''
"""Exercise 7.3: the weight of a long text. This code has a bug.

The policy gradient of a batch is Σ_rows A · Σ_tokens ∇ log π, divided by the number of rows: every token of a row has
the same weight, however long the row is. GRPO's mean over a row's tokens breaks this: the tokens of a long wrong text
are punished less. `policy_loss` should be unbiased. Find what biases it and mend it.
"""

import torch


def policy_loss(logp, advantages, is_action):
    """One number, from logp [B, T], advantages [B] and is_action [B, T]."""
    each = torch.where(is_action, -advantages[:, None] * logp, 0.0)
    per_row = each.sum(1) / is_action.sum(1)
    return per_row.mean()
''',
    (
        "Which weight does a token of a row with 10 tokens get, and one of a row with 2?",
        "The mean over the tokens of a row is one division too many.",
        "return each.sum(1).mean()",
    ),
)
def policy_loss(answer: Answer) -> None:
    """The gradient with respect to each token's log-probability must be −A / B, for long and short rows alike."""
    mask = lengths_mask([4, 1, 2], 4)
    advantages = torch.tensor([-1.0, 2.0, 0.5], dtype=torch.float64)
    leaf = numbers((3, 4), 1).requires_grad_(True)
    loss = answer.policy_loss(leaf, advantages, mask)
    demand(isinstance(loss, torch.Tensor) and loss.requires_grad, "The loss has no gradient: do not detach `logp`.")
    demand(loss.ndim == 0, "Return one number.")
    got = torch.autograd.grad(loss, leaf)[0]
    full = -advantages[:, None].expand(3, 4)
    wanted = torch.where(mask, full / 3, 0.0)
    lengths = mask.sum(1, keepdim=True)
    mistakes = {
        "A token of a long text still weighs less: you divide by the length of its row": wanted / lengths,
        "You divide by the number of all tokens (DAPO's mean): rows of a batch with long texts then weigh less": wanted
        * 3
        / 7,
        "You divide by B · T: this is Dr. GRPO's constant, and right up to the step size; divide by B here": wanted / 4,
        "The padding has a gradient": full / 3,
        "The sign is wrong: a loss is minimised": -wanted,
        "You sum over the rows; take their mean": wanted * 3,
    }
    expect(got, wanted, "the gradient with respect to the log-probabilities of rows of 4, 1 and 2 tokens", mistakes)


@exercise(
    "7.4",
    "Best of n",
    "fill",
    '''
"""Exercise 7.4: best of n.

Sample n texts and keep the one with the best score. No training, but the result is a new distribution. There are N
possible texts, sorted by score, the worst first; no two scores are equal. `probs` are their probabilities. The best of
n draws is at most text i with probability (p_0 + … + p_i)ⁿ. Write `best_of_n`: the probability of each text.
"""

import torch


def best_of_n(probs, n):
    """[N] the probability that each text is the best of n draws; texts are sorted by score, the worst first."""
    ...
''',
    (
        "probs.cumsum(0) ** n is the probability that the best is at most text i.",
        "P(best = i) is P(best ≤ i) − P(best ≤ i − 1).",
        "at_most = probs.cumsum(0) ** n; below = torch.cat([torch.zeros(1), at_most[:-1]]); return at_most - below",
    ),
)
def best_of_n(answer: Answer) -> None:
    """Lists every way to draw n texts."""
    probs = probabilities(4, 2)
    for n in (1, 2, 4):
        wanted = torch.zeros(4, dtype=torch.float64)
        for draws in product(range(4), repeat=n):
            wanted[max(draws)] += probs[list(draws)].prod()
        mistakes = {
            "These are the probabilities that the best is at most text i; subtract the one below": probs.cumsum(0) ** n,
            "This is the worst of n draws": wanted.flip(0)
            if n == 1
            else (1 - probs.cumsum(0) + probs) ** n - (1 - probs.cumsum(0)) ** n,
            "You raise each probability to the power n: that all n draws are text i": probs**n,
            "You return the old probabilities": probs,
        }
        got = answer.best_of_n(probs, n)
        expect(got, wanted, f"n = {n} and probabilities {[round(p, 2) for p in probs.tolist()]}", mistakes)
