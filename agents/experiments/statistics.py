"""Statistics of a suite: several tasks, and on each task the scores of several seeds.

Scores are normalised: 0 is the reference policy, 1 the best attainable. The headline is the mean over tasks of the mean
over seeds. Its interval treats the tasks as fixed and the seeds as drawn: it says how far the number would move if the
same suite were run with other seeds, and nothing about other tasks. It takes the errors of the tasks for independent;
that is why every task has seeds of its own (`agents.experiments.cells.run_seed`).

An interval is left out, and `Estimate.note` says why, wherever its coverage falls below what it claims
(tests/test_experiments_statistics.py measures that).
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import cast

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.optimize import brentq
from scipy.special import nctdtr, stdtr, stdtrit

Scores = Mapping[str, Mapping[int, float]]
"""Task -> index of the seed -> normalised score."""

MIN_TASKS = 10
"""Minimum number of tasks for an interval. With fewer, three seeds on each often miss a collapse of one seed in ten."""
MIN_SEEDS = 3
"""Minimum number of seeds on every task for an interval."""
EXTREME = 0.1
"""A probability of improvement this close to 0 or 1 has no interval: most placements are equal, and their variance says
little."""

MAX_DIVISIONS = 200_000
"""Maximum number of divisions that a permutation test looks at: all of them for two times ten runs (184,756)."""

Numbers = Float[ndarray, "..."] | float
"""One number, or one for each replication."""


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval, or the reason why it has none.

    Attributes:
        value: the estimate.
        low, high: the bounds of the interval; None: not shown.
        degrees: degrees of freedom of the interval.
        p_value: two-sided p-value of the hypothesis of no difference; None if no such hypothesis is tested.
        note: why there is no interval.
    """

    value: float
    low: float | None = None
    high: float | None = None
    degrees: float | None = None
    p_value: float | None = None
    note: str = ""

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


# The equations. Leading dimensions are replications. ------------------------------------------------------------------


def welch_satterthwaite(variances: Float[ndarray, "... K"], degrees: Sequence[int]) -> tuple[Numbers, Numbers]:
    """The variance of a sum of independent terms, and its degrees of freedom: V = Σ v_k, ν = V² / Σ v_k² / ν_k.

    Satterthwaite 1946, "An approximate distribution of estimates of variance components", equation 17; Welch 1947.

    Args:
        variances: the estimated variance v_k of each term.
        degrees: the degrees of freedom ν_k of each of these estimates.

    Returns:
        V and ν; ν is NaN where V is 0.
    """
    total = variances.sum(-1)
    terms = (variances**2 / np.asarray(degrees)).sum(-1)
    return total, np.divide(total**2, terms, out=np.full_like(total, np.nan), where=terms > 0)


def stratified_mean(tasks: Sequence[Float[ndarray, "... _n"]]) -> tuple[Numbers, Numbers, Numbers]:
    """The mean over T tasks of the mean over n_t seeds, its variance Σ s_t² / (n_t T²), and the degrees of freedom.

    Each task is a stratum of weight 1/T: Cochran 1977, "Sampling techniques", equations 5.1, 5.11 and 5.16 (without the
    correction for finite populations).

    Args:
        tasks: the scores of each task, [..., n_t].
    """
    means = np.stack([scores.mean(-1) for scores in tasks], -1)
    variances = [scores.var(-1, ddof=1) / (scores.shape[-1] * len(tasks) ** 2) for scores in tasks]
    return means.mean(-1), *welch_satterthwaite(np.stack(variances, -1), [scores.shape[-1] - 1 for scores in tasks])


def placements(
    x: Float[ndarray, "... n"], y: Float[ndarray, "... m"]
) -> tuple[Float[ndarray, "... n"], Float[ndarray, "... m"]]:
    """The share of y below each x, and the share of x above each y; equal scores count one half.

    The mean of either is the estimate of P(X > Y) + ½ P(X = Y). DeLong et al. 1988, "Comparing the areas under two or
    more correlated receiver operating characteristic curves", equations 2 to 4.
    """
    one, other = x[..., :, None], y[..., None, :]
    above = (one > other) + 0.5 * (one == other)
    return above.mean(-1), above.mean(-2)


def mean_improvement(
    tasks: Sequence[tuple[Float[ndarray, "... _n"], Float[ndarray, "... _m"]]],
) -> tuple[Numbers, Numbers, Numbers]:
    """The mean over tasks of P(X > Y) + ½ P(X = Y), its variance, and the degrees of freedom.

    The average is that of Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264, section 4.3). The variance on one task
    is s_x² / n + s_y² / m, of the placements; with Welch's degrees of freedom: Brunner and Munzel 2000, "The
    nonparametric Behrens-Fisher problem".

    Args:
        tasks: the scores of both agents on each task.
    """
    share, variances, degrees = [], [], []
    for x, y in tasks:
        sides = placements(x, y)
        share.append(sides[0].mean(-1))
        variances += [side.var(-1, ddof=1) / (side.shape[-1] * len(tasks) ** 2) for side in sides]
        degrees += [side.shape[-1] - 1 for side in sides]
    return np.stack(share, -1).mean(-1), *welch_satterthwaite(np.stack(variances, -1), degrees)


def t_interval(value: Numbers, variance: Numbers, degrees: Numbers, confidence: float) -> tuple[Numbers, Numbers]:
    """value ± t_ν √V: Student 1908, with the quantile of ν degrees of freedom."""
    half = stdtrit(degrees, 0.5 + confidence / 2) * np.sqrt(variance)
    return value - half, value + half


# What a table shows ---------------------------------------------------------------------------------------------------


def mean_of_runs(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """The mean of independent runs of one setting, one value for each seed, with its t interval (Student 1908).

    It treats the values as normal. That is a choice for measures of which every seed's value is shown beside it: where
    one run in ten collapses, the interval of a few seeds is too narrow (`MIN_TASKS`).

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    check_scores({"the runs": dict(enumerate(values))})
    runs = np.array(values, dtype=np.float64)
    if len(runs) < MIN_SEEDS:
        return Estimate(float(runs.mean()), note=f"{len(runs)} seeds: an interval needs {MIN_SEEDS}")
    return _estimate(runs.mean(), runs.var(ddof=1) / len(runs), float(len(runs) - 1), confidence, null=None)


def detectable_effect(runs: int, power: float = 0.8, confidence: float = 0.95) -> float:
    """The smallest difference of a mean, in standard deviations of a run, that a two-sided t test detects.

    Cohen 1988, "Statistical power analysis", section 2.5: the δ with P(|T| > t) = power, where T is noncentral t with
    n − 1 degrees of freedom and noncentrality δ √n.

    Args:
        runs: n, at least 2.
        power: probability to detect it.
        confidence: 1 − the probability of a false alarm.
    """
    if runs < 2:
        raise ValueError(f"{runs} runs detect nothing: a test needs at least 2")
    critical = float(stdtrit(runs - 1, 0.5 + confidence / 2))

    def missed(effect: float) -> float:
        shift = effect * math.sqrt(runs)
        below = np.nan_to_num(nctdtr(runs - 1, shift, -critical))  # NaN where it is 0 up to rounding
        return float(nctdtr(runs - 1, shift, critical) - below) - (1 - power)

    above = 1.0
    while missed(above) > 0:
        above *= 1.5
    return cast(float, brentq(missed, 1e-6, above))


def suite_mean(scores: Scores, confidence: float = 0.95) -> Estimate:
    """An agent's mean normalised score over the tasks of a suite: `stratified_mean` with its t interval.

    Args:
        scores: its scores. Tasks may differ in their number of seeds.
        confidence: coverage of the interval.

    Raises:
        ValueError: there are no scores, or one is not finite.
    """
    check_scores(scores)
    return _mean_over_tasks(_arrays(scores), confidence, null=None)


def suite_difference(one: Scores, other: Scores, confidence: float = 0.95) -> Estimate:
    """The mean over tasks of one agent's score less another's, paired by seed.

    d_ti = x_ti − y_ti, and then as `suite_mean`, with the p-value of the paired t test. Runs with the same index have
    the same seed and the same prompts, so that what is easy for one is easy for both.

    Args:
        one, other: scores of the same tasks and seeds.
        confidence: coverage of the interval.

    Raises:
        ValueError: tasks or seeds differ, or a score is not finite.
    """
    _check_same(one, other)
    pairs = {task: {i: one[task][i] - other[task][i] for i in one[task]} for task in one}
    return _mean_over_tasks(_arrays(pairs), confidence, null=0.0)


def probability_of_improvement(one: Scores, other: Scores, confidence: float = 0.95) -> Estimate:
    """The probability that one agent's run beats another's run on the same task, ties as one half, mean over tasks.

    As `mean_improvement`, with an interval that is cut at 0 and 1.

    Args:
        one, other: scores of the same tasks; the seeds may differ.
        confidence: coverage of the interval.

    Raises:
        ValueError: tasks differ, or a score is not finite.
    """
    check_scores(one)
    check_scores(other)
    _check_tasks(one, other)
    tasks = list(zip(_arrays(one), _arrays({task: other[task] for task in one}), strict=True))
    value = float(np.mean([placements(x, y)[0].mean() for x, y in tasks]))
    note = _too_few([min(pair, key=len) for pair in tasks])
    if not note and not EXTREME <= value <= 1 - EXTREME:
        note = f"no interval below {EXTREME} or above {1 - EXTREME}: almost every run of one agent is the better one"
    if note:
        return Estimate(value, note=note)
    estimate = _estimate(*mean_improvement(tasks), confidence, null=0.5)
    if estimate.low is None or estimate.high is None:
        return estimate
    return replace(estimate, low=max(0.0, estimate.low), high=min(1.0, estimate.high))


def interquartile_mean(scores: Scores) -> float:
    """The mean of the middle half of all runs of all tasks.

    Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264, section 4.2). Without an interval: at three to ten seeds the
    bootstrap that is customary covers far less than it claims.

    Raises:
        ValueError: there are no scores, or one is not finite.
    """
    check_scores(scores)
    runs = np.sort([score for seeds in scores.values() for score in seeds.values()])
    cut = len(runs) // 4
    return float(runs[cut : len(runs) - cut].mean())


def performance_profile(scores: Scores, thresholds: Sequence[float]) -> list[float]:
    """The share of runs whose score is above each threshold τ: F(τ) = (1/T) Σ_t (1/n_t) Σ_i 1[x_ti > τ].

    Agarwal et al. 2021 (https://arxiv.org/abs/2108.13264, section 4.1 and equation 1).

    Raises:
        ValueError: there are no scores, or one is not finite.
    """
    check_scores(scores)
    tasks = [np.array(list(seeds.values())) for seeds in scores.values()]
    return [float(np.mean([(task > threshold).mean() for task in tasks])) for threshold in thresholds]


def permutation_p_value(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The two-sided p-value of "both agents have the same distribution of scores", on a single task.

    The share of all ways to divide the runs between the agents in which the means differ by at least as much as they
    do (Fisher 1935, Pitman 1937). It is exact for every shape of noise. If there are more than `MAX_DIVISIONS` ways, as
    many are drawn (always the same), and (1 + count) / (1 + drawn) is returned: Phipson and Smyth 2010
    (https://arxiv.org/abs/1603.05766).

    Args:
        one, other: score of each seed.

    Raises:
        ValueError: an agent has no scores, or one is not finite.
    """
    check_scores({"one agent": one, "the other": other})
    runs, n, m = np.array([*one.values(), *other.values()], dtype=np.float64), len(one), len(other)
    exact = math.comb(n + m, n) <= MAX_DIVISIONS
    divisions = _all_divisions(n, m) if exact else _drawn_divisions(n, m)
    sums = runs[divisions].sum(1)
    differences = abs(sums / n - (runs.sum() - sums) / m)
    observed = abs(runs[:n].mean() - runs[n:].mean())
    count = int((differences >= observed - 1e-12 * abs(runs).max()).sum())  # rounding must not part equal ones
    return count / len(divisions) if exact else (1 + count) / (1 + len(divisions))


@cache
def _all_divisions(n: int, m: int) -> Int[ndarray, "K n"]:
    """Every way to choose n of n + m runs."""
    return np.array(list(itertools.combinations(range(n + m), n)))


@cache
def _drawn_divisions(n: int, m: int) -> Int[ndarray, "K n"]:
    """Random ways to choose n of n + m runs."""
    return np.random.default_rng(0).random((MAX_DIVISIONS, n + m)).argsort(1)[:, :n]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, in the given order: p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) p_(j)).

    Holm 1979, "A simple sequentially rejective multiple test procedure". To reject where p̃ ≤ α keeps the probability
    of any false rejection at most α, whatever the dependence of the tests.

    Raises:
        ValueError: a p-value is not in [0, 1].
    """
    wrong = [p for p in p_values if not 0 <= p <= 1]
    if wrong:
        raise ValueError(f"a p-value is {wrong[0]!r}, and must be from 0 to 1")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


# From cells to scores -------------------------------------------------------------------------------------------------


def normalised(score: float, reference: float, best: float) -> float:
    """(score − reference) / (best − reference): 0 for the reference policy, 1 for the best attainable.

    Raises:
        ValueError: a number is not finite, or the best is not above the reference.
    """
    if not all(map(math.isfinite, (score, reference, best))):
        raise ValueError(f"score {score}, reference {reference} and best {best} must be finite")
    if best <= reference:
        raise ValueError(f"the best attainable score, {best:g}, must be above the reference's, {reference:g}")
    return (score - reference) / (best - reference)


def collect_scores(
    runs: Iterable[tuple[str, int, float]], tasks: Sequence[str], seeds: int, agent: str = "the agent"
) -> dict[str, dict[int, float]]:
    """One agent's scores, which must be complete.

    Args:
        runs: task, index of the seed and normalised score of each run.
        tasks: the suite's tasks.
        seeds: number of seeds: their indices are 0 to seeds − 1.
        agent: its name, for errors.

    Raises:
        ValueError: a run is missing, is there twice, belongs to no task of the suite, or is not finite.
    """
    found: dict[str, dict[int, float]] = {task: {} for task in tasks}
    for task, index, score in runs:
        where = f"{agent} on {task}, seed {index}"
        if task not in found or not 0 <= index < seeds:
            raise ValueError(f"{where}: not in this suite, whose tasks are {', '.join(tasks)} with seeds 0-{seeds - 1}")
        if index in found[task]:
            raise ValueError(f"{where}: there are two results; remove one")
        if not math.isfinite(score):
            raise ValueError(f"{where}: the score is {score}; a failed run counts as 0, the reference's level")
        found[task][index] = float(score)
    missing = [f"{task}, seed {index}" for task in tasks for index in range(seeds) if index not in found[task]]
    if missing:
        raise ValueError(
            f"{agent}: {len(missing)} of {len(tasks) * seeds} results are missing, the first is {missing[0]}; run the "
            "rest, or compare fewer seeds"
        )
    return found


def check_scores(scores: Scores) -> None:
    """Refuses scores that no mean can be taken of.

    Raises:
        ValueError: there are no tasks, a task has no seeds, or a score is not finite.
    """
    if not scores:
        raise ValueError("no scores: there must be at least one task")
    for task, seeds in scores.items():
        if not seeds:
            raise ValueError(f"{task} has no scores: there must be at least one seed")
        for index, score in seeds.items():
            if not math.isfinite(score):
                raise ValueError(f"{task}, seed {index}: the score is {score}, and must be finite")


def _check_tasks(one: Scores, other: Scores) -> None:
    only = sorted(set(one) ^ set(other))
    if only:
        raise ValueError(f"only one of the two agents has scores on {only[0]}: compare them on the same tasks")


def _check_same(one: Scores, other: Scores) -> None:
    check_scores(one)
    check_scores(other)
    _check_tasks(one, other)
    for task in one:
        only = sorted(set(one[task]) ^ set(other[task]))
        if only:
            raise ValueError(f"{task}: only one of the two agents has seed {only[0]}; a paired difference needs both")


def _arrays(scores: Scores) -> list[Float[ndarray, "_n"]]:
    """The scores of each task, in the order of their seeds."""
    return [np.array([seeds[i] for i in sorted(seeds)], dtype=np.float64) for seeds in scores.values()]


def _mean_over_tasks(tasks: list[Float[ndarray, "_n"]], confidence: float, null: float | None) -> Estimate:
    note = _too_few(tasks)
    if note:
        return Estimate(float(np.mean([scores.mean() for scores in tasks])), note=note)
    return _estimate(*stratified_mean(tasks), confidence, null)


def _too_few(tasks: Sequence[Float[ndarray, "_n"]]) -> str:
    """Why there are too few tasks or seeds for an interval; empty if there are enough."""
    if len(tasks) < MIN_TASKS:
        few = "a single task" if len(tasks) == 1 else f"{len(tasks)} tasks"
        return f"{few}: an interval needs {MIN_TASKS}; look at the dots, one for each seed"
    fewest = min(map(len, tasks))
    return f"{fewest} seeds on a task: an interval needs {MIN_SEEDS}" if fewest < MIN_SEEDS else ""


def _estimate(value: Numbers, variance: Numbers, degrees: Numbers, confidence: float, null: float | None) -> Estimate:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, and must be between 0 and 1, such as 0.95")
    if not variance > 0:
        return Estimate(float(value), note="the seeds do not differ, so that their spread is unknown")
    low, high = t_interval(value, variance, degrees, confidence)
    p_value = None if null is None else float(2 * stdtr(degrees, -abs(value - null) / np.sqrt(variance)))
    return Estimate(float(value), float(low), float(high), float(degrees), p_value)
