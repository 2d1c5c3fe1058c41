"""Exercises of lesson 8: from preferences to a reward model."""

import math
from typing import Any

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from agents.lessons.exercise import Answer, demand, exercise, expect, lengths_mask, numbers


def pair_loss(margin: float) -> float:
    """−log σ(margin), with no overflow."""
    return math.log1p(math.exp(-abs(margin))) + max(0.0, -margin)


@exercise(
    "8.1",
    "The loss of Bradley and Terry",
    "fill",
    '''
"""Exercise 8.1: the loss of Bradley and Terry.

A reward model gives each text a score r. It says that the chosen text of a pair wins with probability
σ(r_chosen − r_rejected), where σ(x) = 1 / (1 + exp(−x)). Its loss is minus the mean log-probability of what the
annotators chose:

    −mean of log σ(r_chosen − r_rejected)

Write `bradley_terry`. It must also work for a margin of −1000.
"""

import torch


def bradley_terry(chosen, rejected):
    """One number, from the scores of the chosen texts [N] and of the rejected ones [N]."""
    ...
''',
    (
        "Two equal scores give log 2 = 0.693.",
        "log(sigmoid(−1000)) is log(0). PyTorch has a function for both at once.",
        "-torch.nn.functional.logsigmoid(chosen - rejected).mean()",
    ),
)
def bradley_terry(answer: Answer) -> None:
    """The formula in plain Python, rearranged so that nothing overflows."""
    chosen, rejected = numbers((6,), 1, 2.0), numbers((6,), 2, 2.0)
    margins = (chosen - rejected).tolist()
    wanted = sum(map(pair_loss, margins)) / 6
    mistakes = {
        "The sign is wrong: a loss falls when the chosen text gains": -wanted,
        "Chosen and rejected are exchanged": sum(pair_loss(-m) for m in margins) / 6,
        "You sum over the pairs; take the mean": 6 * wanted,
        "You forget the logarithm": -torch.sigmoid(chosen - rejected).mean(),
        "You take the logarithm of the mean; take the mean of the logarithms": -torch.sigmoid(chosen - rejected)
        .mean()
        .log(),
    }
    expect(answer.bradley_terry(chosen, rejected), wanted, "six pairs", mistakes)
    far = torch.as_tensor(answer.bradley_terry(torch.tensor([-1000.0]), torch.tensor([0.0])))
    demand(bool(torch.isfinite(far).all()), "For a margin of −1000 the loss is infinite: use logsigmoid.")
    expect(far, 1000.0, "a margin of −1000")


@exercise(
    "8.2",
    "All pairs of a ranking",
    "mend",
    '''
"""Exercise 8.2: all pairs of a ranking. This code has a bug.

An annotator ranked K texts of one prompt, the best first. That gives K(K − 1)/2 pairs, and the loss is the mean of
−log σ(r_i − r_j) over all of them, i ranked above j. Find the bug in `ranking_loss` and mend it.
"""

import torch


def ranking_loss(scores):
    """One number, from the scores [K] of the texts in ranked order, the best first."""
    better, worse = scores[:-1], scores[1:]
    return -torch.nn.functional.logsigmoid(better - worse).mean()
''',
    (
        "How many pairs does the code use for K = 4, and how many are there?",
        "Text 0 was ranked above text 2 as well, not only above its neighbour.",
        "better, worse = torch.triu_indices(K, K, offset=1) gives the places of all pairs.",
    ),
)
def ranking_loss(answer: Answer) -> None:
    """A double loop over the pairs."""
    for count in (3, 5):
        scores = numbers((count,), count)
        r = scores.tolist()
        pairs = [r[i] - r[j] for i in range(count) for j in range(i + 1, count)]
        wanted = sum(map(pair_loss, pairs)) / len(pairs)
        near = [r[i] - r[i + 1] for i in range(count - 1)]
        mistakes = {
            "You compare neighbours only: a ranking of K texts has K(K − 1)/2 pairs": sum(map(pair_loss, near))
            / len(near),
            "You sum over the pairs; take the mean, or a long ranking counts more": sum(map(pair_loss, pairs)),
            "You count each pair in both orders, and each text against itself": float(
                -torch.nn.functional.logsigmoid(scores[:, None] - scores).mean()
            ),
            "The order is reversed: the first text is the best": sum(pair_loss(-m) for m in pairs) / len(pairs),
        }
        expect(answer.ranking_loss(scores), wanted, f"a ranking of {count} texts", mistakes)


@exercise(
    "8.3",
    "Annotators who err",
    "fill",
    '''
"""Exercise 8.3: annotators who err.

With probability ε an annotator gives the wrong label, whatever the texts are. The probability that the chosen text was
labelled as chosen is then

    P = (1 − ε) σ(m) + ε σ(−m)        with the margin m = r_chosen − r_rejected

and the loss is −mean of log P. A reward model that knows this does not make its margins too small. Write `noisy_loss`.
"""

import torch


def noisy_loss(margins, error_rate):
    """One number, from the margins [N] and ε, which is below 0.5."""
    ...
''',
    (
        "With ε = 0 this is exercise 8.1.",
        "σ(−m) is 1 − σ(m).",
        "p = (1 - e) * torch.sigmoid(margins) + e * torch.sigmoid(-margins); return -p.log().mean()",
    ),
)
def noisy_loss(answer: Answer) -> None:
    """The labels of a pair with a known margin: the loss must be smallest at that margin."""
    margins = numbers((6,), 3)
    for error_rate in (0.1, 0.0):
        sides = [(1 / (1 + math.exp(-m)), 1 / (1 + math.exp(m))) for m in margins.tolist()]
        wanted = -sum(math.log((1 - error_rate) * p + error_rate * q) for p, q in sides) / 6
        mistakes = {
            "You smooth the loss, not the probability: mix inside the logarithm": -sum(
                (1 - error_rate) * math.log(p) + error_rate * math.log(q) for p, q in sides
            )
            / 6,
            "ε has no effect": -sum(math.log(p) for p, _ in sides) / 6,
            "ε and 1 − ε are exchanged": -sum(
                math.log(error_rate * p + (1 - error_rate) * q + 1e-300) for p, q in sides
            )
            / 6,
            "The sign is wrong": -wanted,
        }
        expect(answer.noisy_loss(margins, error_rate), wanted, f"ε = {error_rate} and six margins", mistakes)
    true, error_rate = 1.5, 0.1
    right = (1 - error_rate) / (1 + math.exp(-true)) + error_rate / (1 + math.exp(true))

    def mean_loss(margin: float) -> float:
        ways = (torch.tensor([margin], dtype=torch.float64), torch.tensor([-margin], dtype=torch.float64))
        first, second = (float(answer.noisy_loss(m, error_rate)) for m in ways)
        return right * first + (1 - right) * second

    found: Any = minimize_scalar(mean_loss, bounds=(0.0, 4.0), method="bounded")
    expect(found.x, true, "the margin with the smallest loss, where the true one is 1.5", tolerance=1e-3)


@exercise(
    "8.4",
    "Where the score is read",
    "mend",
    '''
"""Exercise 8.4: where the score is read. This code has a bug.

A reward model gives a number at every token, and the score of a text is the number at its last token. Texts have
different lengths, and `is_token` is True where there is a token; the padding is behind. Find the bug and mend it.
"""

import torch


def text_scores(values, is_token):
    """[B] the scores, from the numbers [B, T]."""
    return values[:, -1]
''',
    (
        "What stands in the last column of a short text?",
        "The last token of row b is at column is_token[b].sum() − 1.",
        "values[torch.arange(len(values)), is_token.sum(1) - 1]",
    ),
)
def text_scores(answer: Answer) -> None:
    """Looks each row's last token up in plain Python; another padding must not matter."""
    values, lengths = numbers((3, 5), 4), [5, 2, 3]
    mask = lengths_mask(lengths, 5)
    wanted = [float(values[row, length - 1]) for row, length in enumerate(lengths)]
    mistakes = {
        "You read the padding of short texts: take each row's last token": values[:, -1],
        "You are one place too late: the column of the last token is the length − 1": [
            float(values[row, length % 5]) for row, length in enumerate(lengths)
        ],
        "You read the token before the last": [float(values[row, length - 2]) for row, length in enumerate(lengths)],
        "You take the mean over the text": [float(values[r, :n].mean()) for r, n in enumerate(lengths)],
        "You read the first token": values[:, 0],
    }
    expect(answer.text_scores(values, mask), wanted, "texts of 5, 2 and 3 tokens", mistakes)


@exercise(
    "8.5",
    "Calibration",
    "fill",
    '''
"""Exercise 8.5: calibration.

A reward model is calibrated if texts that it expects to win with 70 % do win 70 % of the time. Sort the pairs into ten
bins of equal width by the predicted probability: [0, 0.1), [0.1, 0.2), …, [0.9, 1]. The expected calibration error is

    Σ_bins (share of the pairs in the bin) · |mean prediction − share of wins|

Write `calibration_error`.
"""

import torch


def calibration_error(probability, won):
    """One number, from predictions [N] and won [N] (True or False)."""
    ...
''',
    (
        "The bin of a prediction is (probability * 10).long(), and 1.0 belongs to bin 9.",
        "A bin without a pair contributes nothing: skip it.",
        "Loop over the bins: total += share * (p[inside].mean() - won[inside].float().mean()).abs()",
    ),
)
def calibration_error(answer: Answer) -> None:
    """A loop over the pairs."""
    probability = torch.tensor([0.05, 0.12, 0.18, 0.55, 0.51, 0.58, 0.93, 1.0, 0.97, 0.91], dtype=torch.float64)
    won = torch.tensor([False, True, False, True, True, False, True, False, True, True])
    gaps, counts = [], []
    for index in range(10):
        inside = [i for i, p in enumerate(probability.tolist()) if min(9, int(p * 10)) == index]
        if inside:
            counts.append(len(inside))
            gaps.append(sum(float(won[i]) - float(probability[i]) for i in inside) / len(inside))
    wanted = sum(n * abs(g) for n, g in zip(counts, gaps, strict=True)) / 10
    mistakes = {
        "You forget to weight each bin by its share of the pairs": sum(map(abs, gaps)) / len(gaps),
        "You add the gaps of the bins without weights": sum(map(abs, gaps)),
        "You forget the absolute value: gaps of opposite signs cancel": -sum(
            n * g for n, g in zip(counts, gaps, strict=True)
        )
        / 10,
        "You compare each pair by itself; compare the means of a bin": float((probability - won.double()).abs().mean()),
        "The prediction 1.0 belongs to the last bin": (
            sum(n * abs(g) for n, g in zip(counts[:-1], gaps[:-1], strict=True)) + 3 * abs(1 - (0.93 + 0.97 + 0.91) / 3)
        )
        / 10,
    }
    expect(answer.calibration_error(probability, won), wanted, "ten pairs in four bins", mistakes)


@exercise(
    "8.6",
    "DPO without a reward model",
    "mend",
    '''
"""Exercise 8.6: DPO without a reward model. This code has a bug.

The soft-optimal policy of lesson 5 can be solved for the score: score = β log(π/π_ref) + a constant of the prompt. DPO
puts this into the loss of exercise 8.1, so that the policy is its own reward model:

    −mean of log σ(β (log-ratio of chosen − log-ratio of rejected)),     log-ratio = log π(y) − log π_ref(y)

Find the bug in `dpo_loss` and mend it.
"""

import torch


def dpo_loss(chosen_logp, rejected_logp, chosen_reference, rejected_reference, beta):
    """One number, from four arrays [N] of log-probabilities of whole texts."""
    margin = beta * (chosen_logp - rejected_logp)
    return -torch.nn.functional.logsigmoid(margin).mean()
''',
    (
        "Two of the arguments are never used.",
        "If the policy is the reference, the loss is log 2 for every pair.",
        "margin = beta * ((chosen_logp - chosen_reference) - (rejected_logp - rejected_reference))",
    ),
)
def dpo_loss(answer: Answer) -> None:
    """The formula in plain Python; and log 2 for a policy that is its reference."""
    a: list[Tensor] = [numbers((5,), seed) - 5 for seed in (5, 6, 7, 8)]
    beta = 0.5

    def loss(sign: list[int], factor: float = beta) -> float:
        margins = sum(s * x for s, x in zip(sign, a, strict=True))
        assert isinstance(margins, Tensor)
        return sum(pair_loss(factor * m) for m in margins.tolist()) / 5

    mistakes = {
        "The reference is missing: a text that was probable from the start is no gain": loss([1, -1, 0, 0]),
        "Chosen and rejected are exchanged": loss([-1, 1, 1, -1]),
        "The signs of the reference are wrong: a log-ratio is log π − log π_ref": loss([1, -1, 1, -1]),
        "You forget β": loss([1, -1, -1, 1], 1.0),
        "You divide by β; multiply": loss([1, -1, -1, 1], 1 / beta),
    }
    expect(answer.dpo_loss(*a, beta), loss([1, -1, -1, 1]), "five pairs and β = 0.5", mistakes)
    same = answer.dpo_loss(a[0], a[1], a[0], a[1], beta)
    expect(same, math.log(2), "a policy that is its reference: no pair is preferred")
