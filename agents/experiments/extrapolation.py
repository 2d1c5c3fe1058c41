"""Extrapolation of trial runs: what a full run will reach, from runs on 1, 2, 5 and 10 % of the data."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from scipy.special import expit, ndtri, stdtrit

from agents.experiments.statistics import Estimate
from agents.experiments.win_rates import Values

Curve = Callable[[Float[ndarray, "*any"]], tuple[Float[ndarray, "*any"], Float[ndarray, "*any"]]]
"""F(y), the part of the way from chance to the ceiling that a learning curve has gone, and its derivative."""

# The straight line ---------------------------------------------------------------------------------------------------


def extrapolate(sizes: Values, values: Values, size: float | int, confidence: float = 0.9) -> Estimate:
    """The value to expect of one new run at `size`, with its prediction interval.

    Fits value = a + b log(size) by least squares; the interval is ŷ ± t s √(1 + 1/n + (x − x̄)² / Σ(x_i − x̄)²) with
    x = log(size) and n − 2 degrees of freedom (Draper & Smith 1998, "Applied regression analysis", section 3.1). It
    holds if the trend goes on. Accuracies bend as they approach their ceiling: see `extrapolate_accuracy`.

    Args:
        sizes: numbers of examples of the trial runs; several runs may have the same size.
        values: what each reached.
        size: number of examples of the full run.
        confidence: coverage of the interval.

    Raises:
        ValueError: there are fewer than three runs or two sizes, or a number is not positive or not finite.
    """
    _check(sizes, values, size, confidence)
    x, y, at = np.log(np.asarray(sizes, dtype=np.float64)), np.asarray(values, dtype=np.float64), math.log(size)
    centred, degrees = x - x.mean(), len(x) - 2
    slope = float(centred @ y / (centred @ centred))
    expected = float(y.mean() + slope * (at - x.mean()))
    residuals = y - y.mean() - slope * centred
    variance = residuals @ residuals / degrees * (1 + 1 / len(x) + (at - x.mean()) ** 2 / (centred @ centred))
    half = float(stdtrit(degrees, 0.5 + confidence / 2) * math.sqrt(variance))
    return Estimate(expected, expected - half, expected + half, float(degrees))


def _check(sizes: Values, values: Values, size: float | int, confidence: float) -> None:
    if len(sizes) != len(values) or len(sizes) < 3 or len({*sizes}) < 2:
        raise ValueError(
            f"{len(sizes)} sizes and {len(values)} values: at least three trial runs of at least two sizes are needed"
        )
    if not all(math.isfinite(x) and x > 0 for x in (*sizes, size)) or not all(map(math.isfinite, values)):
        raise ValueError("sizes must be positive, and sizes and values finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, and must be between 0 and 1, such as 0.9")


# Accuracies ----------------------------------------------------------------------------------------------------------


def _odds(y: Float[ndarray, "*any"]) -> tuple[Float[ndarray, "*any"], Float[ndarray, "*any"]]:
    """1 / (1 + e^−y): the way gone is to the way left as a power of the size.

    Alabdulmohsin et al. 2022, M4 with α = 1, https://arxiv.org/abs/2209.06640.
    """
    rise = expit(y)
    return rise, rise * (1 - rise)


def _order(y: Float[ndarray, "*any"]) -> tuple[Float[ndarray, "*any"], Float[ndarray, "*any"]]:
    """(2/π) arctan e^y: how often a score with normal noise orders a pair as the score without it does (Sheppard 1899).

    The angle between the two is arctan(noise / signal), and noise / signal is a power of the size. In the end, so is
    what is missing to the ceiling.
    """
    ratio = np.exp(np.clip(y, -30, 30))
    return 2 / np.pi * np.arctan(ratio), 2 / np.pi * ratio / (1 + ratio**2)


def _exponential(y: Float[ndarray, "*any"]) -> tuple[Float[ndarray, "*any"], Float[ndarray, "*any"]]:
    """1 − exp(−e^y): the ceiling is reached quickly, as when there is little to learn."""
    power = np.exp(np.clip(y, -30, 3.5))
    return -np.expm1(-power), power * np.exp(-power)


CURVES: tuple[Curve, ...] = (_odds, _order, _exponential)
"""The forms of a learning curve; before the trials, each is as probable as the others."""
CEILINGS = np.linspace(0.6, 1.0, 32)
"""c: the accuracy that no amount of data exceeds: 1 if there are no wrong labels."""
SPREADS = np.geomspace(0.01, 4.0, 5)
"""κ: how much runs on different comparisons differ; 1: as much as if their accuracy were measured on these."""
MEAN, DEVIATION = np.array([0.0, 0.5]), np.array([2.0, 0.3])
"""Of u and s before the trials. The error of a statistical estimate falls with s = ½, and usual exponents of learning
curves are between 0 and 1 (Hestness et al. 2017, https://arxiv.org/abs/1712.00409)."""
NODES = ndtri((np.arange(9) + 0.5) / 9)
"""A normal distribution as nine points of equal weight."""
STEPS = np.stack(np.meshgrid(np.arange(-3.0, 4.0), np.arange(-3.0, 4.0)), -1).reshape(-1, 2)
"""Where u and s are evaluated, in deviations from the most probable ones."""
ROUNDS = 8
"""Rounds of Fisher scoring."""
CELLS = 4096
"""Accuracies from 0 to 1 that are told apart."""


def extrapolate_accuracy(
    sizes: Values, accuracies: Values, size: float | int, pairs: int, confidence: float = 0.9
) -> Estimate:
    """The accuracy to expect of one new run on `size` comparisons, with its prediction interval.

    The accuracy of a run on n comparisons is normal about a = ½ + (c − ½) F(u + s x), x = log n − mean of the trials'
    log n, with variance a (1 − a) (1 / pairs + κ / n): few pairs to test on, and few comparisons to learn from. This
    is a psychometric function between chance and a ceiling, with more spread than binomial, as in Schütt et al. 2016
    (https://doi.org/10.1016/j.visres.2016.02.002). What the trials cannot
    tell is averaged over by Bayes' rule, and not chosen: the form F (`CURVES`), the ceiling c (1 with probability ½,
    because many tests have no wrong labels; else uniform), κ (uniform in its logarithm), and u, s (normal; by Fisher
    scoring and a grid around its result). The interval is that of the new run's measured accuracy, which has noise too.

    Args:
        sizes: numbers of comparisons of the trial runs; several runs may have the same size.
        accuracies: of each, measured on held-out pairs.
        size: number of comparisons of the full run.
        pairs: how many pairs are held out.
        confidence: coverage of the interval.

    Returns:
        The median, and the interval; its bounds are accuracies that so many pairs can have.

    Raises:
        ValueError: there are fewer than three runs or two sizes, a number is not positive or not finite, an accuracy is
            not between 0 and 1, or no pair is held out.
    """
    if pairs < 1:
        raise ValueError("there are no held-out pairs, or all of them are ties, so no run has an accuracy")
    _check(sizes, accuracies, size, confidence)
    a = np.asarray(accuracies, dtype=np.float64)
    if not ((a >= 0) & (a <= 1)).all():
        raise ValueError(f"accuracies from {a.min():g} to {a.max():g}: each must be from 0 to 1")
    x = np.log(np.asarray(sizes, dtype=np.float64))
    middle = x.mean()
    parts = [_posterior(curve, x - middle, a, math.log(size) - middle, pairs, middle) for curve in CURVES]
    log_weights, expected, variance = (np.concatenate(part).ravel() for part in zip(*parts, strict=True))
    kept = log_weights > log_weights.max() - 8
    measured = expected[kept, None] + np.sqrt(variance[kept, None]) * NODES
    weights = np.repeat(np.exp(log_weights[kept] - log_weights.max()), len(NODES))
    low, value, high = _quantiles(measured.ravel(), weights, confidence)
    return Estimate(value, math.floor(low * pairs) / pairs, math.ceil(high * pairs) / pairs)


def _posterior(
    curve: Curve, x: Float[ndarray, " N"], accuracies: Float[ndarray, " N"], at: float, pairs: int, middle: float
) -> tuple[Float[ndarray, "K M"], Float[ndarray, "K M"], Float[ndarray, "K M"]]:
    """For the K likely pairs of c and κ, at M values of u and s: log-probability, and mean and variance at `at`."""
    c, kappa = (grid.reshape(-1, 1) for grid in np.meshgrid(CEILINGS, SPREADS))

    def variance_of(a: Float[ndarray, "*any"], kappa: Float[ndarray, "*ones"], x: Any) -> Float[ndarray, "*any"]:
        """Of a run at x; that of one wrong pair where it would be less."""
        return np.maximum(a * (1 - a), 1 / pairs) * (1 / pairs + kappa / np.exp(x + middle))

    design, precision = np.stack([np.ones_like(x), x], 1), np.diag(DEVIATION**-2.0)

    def around(u_s: Float[ndarray, "K 2"]) -> tuple[ndarray, ...]:
        """Mean, its derivative by y, and variance of each trial; and the information about u and s."""
        rise, slope = curve(u_s @ design.T)
        expected, slope = 0.5 + (c - 0.5) * rise, (c - 0.5) * slope
        variance = variance_of(expected, kappa, x)
        return expected, slope, variance, np.einsum("kn,ni,nj->kij", slope**2 / variance, design, design) + precision

    u_s = np.repeat(MEAN[None], len(c), 0)
    for _ in range(ROUNDS):
        expected, slope, variance, information = around(u_s)
        score = (slope * (accuracies - expected) / variance) @ design - (u_s - MEAN) @ precision
        step = np.linalg.solve(information, score[..., None])[..., 0]
        u_s = u_s + step / np.maximum(1, np.abs(step).max(1, keepdims=True))
    expected, _, variance, information = around(u_s)
    near = _log_weight(accuracies, expected, variance, u_s)  # of one value of u and s
    near -= 0.5 * np.linalg.slogdet(information)[1]
    kept = near > near.max() - 9
    c, kappa = c[kept, None], kappa[kept, None]
    # From standard coordinates to u and s; a trapezoid rule with steps of one deviation is exact enough for a bell.
    scale = np.linalg.inv(np.linalg.cholesky(information[kept]))
    u_s = u_s[kept, None] + STEPS @ scale
    expected = 0.5 + (c - 0.5) * curve(u_s @ design.T)[0]
    log_weight = _log_weight(accuracies, expected, variance_of(expected, kappa, x), u_s)
    prior = np.where(c == 1, 0.5, 0.5 / (len(CEILINGS) - 1))[..., 0] * np.linalg.det(scale)[:, None]
    expected = 0.5 + (c[..., 0] - 0.5) * curve(u_s @ np.array([1.0, at]))[0]
    return np.log(prior) + log_weight, expected, variance_of(expected, kappa[..., 0], at)


def _log_weight(
    accuracies: Float[ndarray, " N"],
    expected: Float[ndarray, "*any N"],
    variance: Float[ndarray, "*any N"],
    u_s: Float[ndarray, "*any 2"],
) -> Float[ndarray, "*any"]:
    """The logarithm of the likelihood and of the prior of u and s, less constants."""
    misfit = ((accuracies - expected) ** 2 / variance + np.log(variance)).sum(-1)
    return -0.5 * (misfit + (((u_s - MEAN) / DEVIATION) ** 2).sum(-1))


def _quantiles(
    values: Float[ndarray, " N"], weights: Float[ndarray, " N"], confidence: float
) -> tuple[float, float, float]:
    """The lower bound, the median and the upper bound of values with weights, within 0 and 1."""
    cells = np.clip(values * CELLS, 0, CELLS - 1).astype(np.int64)
    share = np.cumsum(np.bincount(cells, weights, CELLS)) / weights.sum()
    wanted = [(1 - confidence) / 2, 0.5, (1 + confidence) / 2]
    low, value, high = np.interp(wanted, share, np.arange(1, CELLS + 1) / CELLS)
    return float(low), float(value), float(high)
