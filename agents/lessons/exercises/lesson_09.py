"""Exercises of lesson 9: hacking the reward."""

import numpy as np
import torch

from agents.lessons.exercise import Answer, demand, exercise, expect, numbers


@exercise(
    "9.1",
    "Chosen by one judge, measured by another",
    "fill",
    '''
"""Exercise 9.1: chosen by one judge, measured by another.

The *proxy* score comes from a reward model; the *gold* score is what people really want. For each prompt there are n
texts. Best of n keeps the text with the best proxy score. Is it good? Write `gold_of_best`: the mean gold score, over
the prompts, of the texts that the proxy chooses.
"""

import torch


def gold_of_best(proxy, gold):
    """One number, from two arrays [prompts, n]."""
    ...
''',
    (
        "proxy.argmax(1) is the choice for each prompt.",
        "You need, for each prompt, the gold score at that place.",
        "gold[torch.arange(len(gold)), proxy.argmax(1)].mean()",
    ),
)
def gold_of_best(answer: Answer) -> None:
    """A loop over the prompts."""
    proxy, gold = numbers((5, 4), 1), numbers((5, 4), 2)
    picks = [max(range(4), key=lambda j, row=row: float(proxy[row, j])) for row in range(5)]
    wanted = sum(float(gold[row, j]) for row, j in enumerate(picks)) / 5
    mistakes = {
        "You choose by the gold score, which the policy never sees: choose by the proxy": gold.max(1).values.mean(),
        "You measure the proxy score of the choice; measure its gold score": proxy.max(1).values.mean(),
        "You choose one text of all the prompts; choose one for each prompt": gold.flatten()[int(proxy.argmax())],
        "You choose over the prompts; choose over the texts of a prompt": gold[proxy.argmax(0), torch.arange(4)].mean(),
        "You take the mean over all texts": gold.mean(),
    }
    expect(answer.gold_of_best(proxy, gold), wanted, "five prompts with four texts each", mistakes)


@exercise(
    "9.2",
    "When to stop",
    "mend",
    '''
"""Exercise 9.2: when to stop. This code has a bug.

A policy was trained on a proxy score, and saved after each update. People judged samples of every saved policy: `gold`.
Which policy should be used? A policy with a KL above `most_kl` nats must not be used at all. If two are equally good,
take the earlier one. Find the bug in `choose` and mend it.
"""


def choose(proxy, gold, kl, most_kl):
    """The number of the update to use, or −1 if every KL is too large; three lists of the same length."""
    best = -1
    for update in range(len(proxy)):
        if kl[update] <= most_kl and (best < 0 or proxy[update] > proxy[best]):
            best = update
    return best
''',
    (
        "Which of the two scores rises for ever when a reward is hacked?",
        "The proxy is what the policy was trained to raise. It cannot be the judge as well.",
        "Compare gold[update] with gold[best].",
    ),
)
def choose(answer: Answer) -> None:
    """The definition, by sorting; ties and limits included."""
    for gold, kl, most, wanted in (
        ([0.1, 0.5, 0.8, 0.4, -1.0], [0.0, 1.0, 3.0, 8.0, 20.0], 100.0, 2),
        ([0.1, 0.5, 0.8, 0.9, -1.0], [0.0, 1.0, 3.0, 8.0, 20.0], 5.0, 2),
        ([0.1, 0.7, 0.7, 0.4, -1.0], [0.0, 1.0, 3.0, 8.0, 20.0], 100.0, 1),
        ([-3.0, -2.0, -4.0, -5.0, -6.0], [0.5, 1.0, 3.0, 8.0, 20.0], 100.0, 1),
        ([0.1, 0.7, 0.7, 0.4, -1.0], [1.0, 1.0, 3.0, 8.0, 20.0], 0.5, -1),
    ):
        proxy = [0.0, 1.0, 2.0, 3.0, 4.0]
        allowed = [u for u in range(5) if kl[u] <= most]
        best = max(gold[u] for u in allowed) if allowed else None
        mistakes = {
            "You choose by the proxy, which rises even while the texts become worse": max(
                allowed, key=lambda u: proxy[u], default=-1
            ),
            "You ignore the limit of the KL": max(range(5), key=lambda u: gold[u]),
            "Of two equally good policies, take the earlier one": max(
                (u for u in allowed if gold[u] == best), default=-1
            ),
        }
        expect(answer.choose(proxy, gold, kl, most), wanted, f"gold {gold}, KL {kl} and a limit of {most}", mistakes)


@exercise(
    "9.3",
    "Texts that never end",
    "mend",
    '''
"""Exercise 9.3: texts that never end. This code has a bug.

A text without an end token has been cut off by the budget. A reward model never saw such texts, and may like them. So
their score is *replaced* by a fixed low number, `missing_eos_score`, whatever the reward model says. Find the bug in
`final_scores` and mend it.
"""

import torch


def final_scores(scores, has_end, missing_eos_score):
    """[B] what the policy is paid, from the scores [B] and has_end [B] (True or False)."""
    return torch.where(has_end, scores, scores + missing_eos_score)
''',
    (
        "How much is a text paid that the reward model gives 10, without an end, and with a fixed score of −1?",
        "A penalty can be outweighed. A replacement cannot.",
        "torch.where(has_end, scores, missing_eos_score)",
    ),
)
def final_scores(answer: Answer) -> None:
    """Row by row; a cut-off text with an excellent score is among them."""
    scores = torch.tensor([0.5, 10.0, -2.0, 0.3], dtype=torch.float64)
    has_end = torch.tensor([True, False, False, True])
    mistakes = {
        "You add the number to the score, so a cut-off text can still be paid 9: replace the score": [
            0.5,
            9.0,
            -3.0,
            0.3,
        ],
        "The condition is the wrong way round: texts with an end keep their score": [-1.0, 10.0, -2.0, -1.0],
        "You take the smaller of the two: the score of every cut-off text is the fixed number": [0.5, -1.0, -2.0, 0.3],
        "You replace it by 0": [0.5, 0.0, 0.0, 0.3],
    }
    expect(answer.final_scores(scores, has_end, -1.0), [0.5, -1.0, -1.0, 0.3], "the scores 0.5, 10, −2, 0.3", mistakes)


@exercise(
    "9.4",
    "What is left without the length",
    "fill",
    '''
"""Exercise 9.4: what is left without the length.

Many reward models like long texts. Fit a straight line, score ≈ a + b · length, by least squares, and keep what is left
of each score: score − b · (length − mean length). The mean score does not change, and the length explains nothing more.
Write `without_length`. If all lengths are equal, the scores do not change.
"""

import torch


def without_length(scores, lengths):
    """[N] the scores without the part that the length explains, from scores [N] and lengths [N]."""
    ...
''',
    (
        "The slope b is the covariance of length and score, divided by the variance of the length.",
        "With centred = lengths - lengths.mean(): b = (centred * scores).sum() / centred.square().sum().",
        "Return scores - b * centred; and scores unchanged if centred is all 0.",
    ),
)
def without_length(answer: Answer) -> None:
    """numpy.polyfit is the oracle."""
    lengths = torch.tensor([3.0, 9.0, 4.0, 12.0, 7.0, 5.0], dtype=torch.float64)
    scores = 0.4 * lengths + numbers((6,), 3)
    slope, intercept = np.polyfit(lengths.numpy(), scores.numpy(), 1)
    centred = lengths - lengths.mean()
    mistakes = {
        "You subtract the whole line: the mean score should not change": scores - slope * lengths - intercept,
        "You subtract b · length; subtract b · (length − mean length)": scores - slope * lengths,
        "You divide the score by the length; fit a line": scores / lengths,
        "You add the slope": scores + slope * centred,
    }
    got = answer.without_length(scores, lengths)
    expect(got, scores - slope * centred, "six texts of 3 to 12 tokens", mistakes)
    equal = torch.as_tensor(answer.without_length(scores, torch.full((6,), 4.0, dtype=torch.float64)))
    demand(bool(torch.isfinite(equal).all()), "For equal lengths you divide by 0: return the scores as they are.")
    expect(equal, scores, "six texts of the same length")
