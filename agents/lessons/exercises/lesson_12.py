"""Exercises of lesson 12: reading a run, and testing an algorithm."""

from collections.abc import Callable
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from agents.lessons.exercise import Answer, Wrong, demand, exercise, expect, numbers


@exercise(
    "12.1",
    "An interval over seeds",
    "mend",
    '''
"""Exercise 12.1: an interval over seeds. This code has a bug.

An algorithm was run with n seeds. The 95 % confidence interval of its mean score is

    mean ± t · s / √n

where s is the standard deviation over the seeds (divided by n − 1) and t the quantile of Student's distribution, which
is given. Find the bug in `interval` and mend it.
"""

import statistics


def interval(scores, t):
    """(low, high), from a list with one score per seed."""
    mean = statistics.mean(scores)
    half = t * statistics.stdev(scores)
    return mean - half, mean + half
''',
    (
        "How wide is the interval with 100 seeds, compared with 4?",
        "This is an interval for one more run; the interval of the mean gets narrower with n.",
        "half = t * statistics.stdev(scores) / len(scores) ** 0.5",
    ),
)
def interval(answer: Answer) -> None:
    """scipy.stats is the oracle."""
    for seed, count in ((1, 5), (2, 9)):
        scores = numbers((count,), seed).tolist()
        t = float(stats.t.ppf(0.975, count - 1))
        wanted = stats.ttest_1samp(scores, 0.0).confidence_interval(0.95)
        mean, half = sum(scores) / count, (wanted.high - wanted.low) / 2
        mistakes = {
            "You forget to divide by √n: more seeds must make the interval narrower": _around(mean, half * count**0.5),
            "You divide by n; divide by its square root": _around(mean, half / count**0.5),
            "The deviation is divided by n; divide by n − 1": _around(mean, half * ((count - 1) / count) ** 0.5),
            "You forget t: the interval covers too little": _around(mean, half / t),
            "The order is (low, high)": [wanted.high, wanted.low],
        }
        got = list(answer.interval(scores, t))
        expect(got, [wanted.low, wanted.high], f"{count} seeds", mistakes)


def _around(mean: float, half: float) -> list[float]:
    return [mean - half, mean + half]


@exercise(
    "12.2",
    "Which GAE is broken?",
    "fill",
    '''
"""Exercise 12.2: which GAE is broken?

Somebody gives you a function gae(rewards, values, gamma, lam) for one row that has ended: lists of numbers in, a list
of advantages out (exercises 4.1 and 4.2). You cannot read its code. Write `is_right`: True if the function is right,
and False if it is not. It will be called with a right function and with broken ones that you do not see.
"""


def is_right(gae):
    """Whether a function computes generalised advantages correctly."""
    ...
''',
    (
        "Work two rows out by hand, and compare. Use values and rewards that differ, and γ and λ below 1.",
        "Some bugs show only with γ < 1, some only with λ < 1, some only in the last step.",
        "Compute the advantages with your own loop, for several inputs, and compare with a small tolerance.",
    ),
)
def which_gae(answer: Answer) -> None:
    """The right function must be accepted, twice over; every planted bug must be found."""
    bugs = {
        "the sign of the advantages is wrong": _gae(sign=-1.0),
        "γ is not used in the temporal difference": _gae(gamma_in_delta=False),
        "γ is not used between the differences": _gae(gamma_between=False),
        "λ is not used": _gae(lam_used=False),
        "the value of the state is not subtracted": _gae(baseline=0.0),
        "the last value follows the last token": _gae(bootstraps=True),
        "the sum runs forwards": _gae(forwards=True),
        "the first reward is lost": _gae(first=0.0),
    }
    _judge(answer.is_right, {"backwards": _gae(), "as a double sum": _gae_as_a_sum}, bugs)


@exercise(
    "12.3",
    "Which PPO loss is broken?",
    "fill",
    '''
"""Exercise 12.3: which PPO loss is broken?

Somebody gives you loss(ratio, advantage), PPO's loss of one token with ε = 0.2 (exercise 6.1): two numbers in, one
number out. Write `is_right`: True if it is right, and False if it is not. It will be called with a right function and
with broken ones that you do not see.
"""


def is_right(loss):
    """Whether a function is PPO's clipped loss for ε = 0.2."""
    ...
''',
    (
        "Draw the loss over the ratio, once for A > 0 and once for A < 0: figure 1 of the paper.",
        "Six points matter: a ratio below, inside and above the bounds, for each sign of A.",
        "Compare with -min(r * a, max(0.8, min(1.2, r)) * a) at these points.",
    ),
)
def which_loss(answer: Answer) -> None:
    """As above, for PPO's loss."""

    def clipped(ratio: float, low: float = 0.8, high: float = 1.2) -> float:
        return max(low, min(high, ratio))

    bugs: dict[str, Callable[..., Any]] = {
        "nothing is clipped": lambda r, a: -r * a,
        "there is no minimum: the clipped value is always taken": lambda r, a: -clipped(r) * a,
        "the maximum is taken": lambda r, a: -max(r * a, clipped(r) * a),
        "the sign is wrong": lambda r, a: min(r * a, clipped(r) * a),
        "only the upper bound is clipped": lambda r, a: -min(r * a, min(1.2, r) * a),
        "only the lower bound is clipped": lambda r, a: -min(r * a, max(0.8, r) * a),
        "the minimum of the ratios is multiplied": lambda r, a: -min(r, clipped(r)) * a,
        "the bounds are 0.9 and 1.1": lambda r, a: -min(r * a, clipped(r, 0.9, 1.1) * a),
    }
    right = {
        "as in the paper": lambda r, a: -min(r * a, clipped(r) * a),
        "by cases": lambda r, a: -a * (min(r, 1.2) if a > 0 else max(r, 0.8)),
    }
    _judge(answer.is_right, right, bugs)


def _judge(
    is_right: Callable[..., Any], right: dict[str, Callable[..., Any]], bugs: dict[str, Callable[..., Any]]
) -> None:
    for name, function in right.items():
        demand(bool(is_right(function)), f"You refuse a right function, written {name}: is your tolerance too small?")
    missed = [bug for bug, function in bugs.items() if _accepts(is_right, function)]
    caught = len(bugs) - len(missed)
    demand(not missed, f"You find {caught} of {len(bugs)} broken functions. One that you accept: {(*missed, '')[0]}.")


def _accepts(is_right: Callable[..., Any], function: Callable[..., Any]) -> bool:
    try:
        return bool(is_right(function))
    except Wrong:
        return False  # a test that fails with an error has found the bug, too


def _gae(
    sign: float = 1.0,
    gamma_in_delta: bool = True,
    gamma_between: bool = True,
    lam_used: bool = True,
    baseline: float = 1.0,
    bootstraps: bool = False,
    forwards: bool = False,
    first: float = 1.0,
) -> Callable[..., list[float]]:
    """GAE of one row, with switches that break it."""

    def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
        size = len(rewards)
        paid = [r * (first if t == 0 else 1.0) for t, r in enumerate(rewards)]
        following = [*values[1:], values[-1] if bootstraps else 0.0]
        in_delta = gamma if gamma_in_delta else 1.0
        deltas = [paid[t] + in_delta * following[t] - baseline * values[t] for t in range(size)]
        factor = (gamma if gamma_between else 1.0) * (lam if lam_used else 1.0)
        advantages, running = [0.0] * size, 0.0
        for t in range(size) if forwards else reversed(range(size)):
            running = deltas[t] + factor * running
            advantages[t] = sign * running
        return advantages

    return gae


def _gae_as_a_sum(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    size, v = len(rewards), [*values, 0.0]
    deltas = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(size)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, size)) for t in range(size)]


@exercise(
    "12.4",
    "The mean over an update",
    "mend",
    '''
"""Exercise 12.4: the mean over an update. This code has a bug.

A metric, such as the entropy, is a mean over all tokens of an update. The update has several minibatches, and each
gives its own mean and its number of tokens. Find the bug in `overall_mean` and mend it.
"""


def overall_mean(means, counts):
    """One number, from a list of means and the list of the numbers of tokens behind them."""
    return sum(means) / len(means)
''',
    (
        "Two minibatches: 1 token with the value 10, and 9 tokens with the value 0. What is the mean?",
        "A minibatch with more tokens counts more.",
        "sum(m * n for m, n in zip(means, counts)) / sum(counts)",
    ),
)
def overall_mean(answer: Answer) -> None:
    """Puts all tokens side by side again; an empty minibatch counts nothing."""
    counts = [1, 9, 4]
    parts: list[Tensor] = [numbers((n,), n) + n for n in counts]
    means = [float(part.mean()) for part in parts]
    mistakes = {
        "Every minibatch counts the same; weight it by its number of tokens": sum(means) / 3,
        "You return the mean of the last minibatch": means[-1],
        "You divide by the number of minibatches; divide by the number of tokens": sum(
            m * n for m, n in zip(means, counts, strict=True)
        )
        / 3,
        "You add the means up": sum(means),
    }
    expect(answer.overall_mean(means, counts), torch.cat(parts).mean(), "minibatches of 1, 9 and 4 tokens", mistakes)
    got = answer.overall_mean([2.0, 0.0], [3, 0])
    expect(
        got, 2.0, "a minibatch of 3 tokens with the mean 2, and one without tokens", {"An empty minibatch counts": 1.0}
    )
