"""Win rates: how often one policy's answer is preferred to another's, raw and at equal length."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Num
from numpy import ndarray
from scipy.special import expit, ndtri

from agents.experiments.statistics import Estimate
from lmgym.preferences import wilson_interval

Values = Sequence[float] | Sequence[int] | Num[ndarray, "..."]

SEPARATED = 30.0
"""Above this coefficient of the logistic regression, wins and losses can be told apart by length alone."""


def wins(first: Values, second: Values) -> Float[ndarray, " N"]:
    """1 where the first score is larger, 0 where the second is, ½ where they are equal.

    Raises:
        ValueError: their numbers differ, or a score is not finite.
    """
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 1 or not len(one):
        raise ValueError(f"{one.size} and {other.size} scores cannot be compared in pairs: give one of each per prompt")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("a score is not finite: leave its pair out, and say so")
    return (one > other) + 0.5 * (one == other)


def win_rate(outcomes: Values, confidence: float = 0.95) -> Estimate:
    """The share of wins, ties as one half, with Wilson's interval, which is slightly too wide with ties.

    Args:
        outcomes: 1, ½ or 0 of each prompt, as from `wins`.
        confidence: coverage of the interval.

    Raises:
        ValueError: there are no outcomes, or one is not in [0, 1].
    """
    given = _checked(outcomes)
    share = float(given.mean())
    return Estimate(share, *wilson_interval(share, len(given), confidence))


def length_controlled_win_rate(
    outcomes: Values,
    lengths: Values,
    other_lengths: Values,
    confidence: float = 0.95,
) -> Estimate:
    """The probability of a win at equal lengths: σ(a) of the fit P(win) = σ(a + b · log(length / other length)).

    Stiennon et al. 2020, appendix F (https://arxiv.org/abs/2009.01325), regress on the logarithm of the ratio of the
    lengths, too. The fit is by maximum likelihood; the interval is that of a (Wald), through σ.

    Args:
        outcomes: 1, ½ or 0 of each prompt, as from `wins`.
        lengths: of the answers that win where the outcome is 1, at least 1 token each.
        other_lengths: of the answers that they are compared with.
        confidence: coverage of the interval.

    Raises:
        ValueError: numbers differ, or a length is below 1.
    """
    given = _checked(outcomes)
    own, other = np.asarray(lengths, dtype=np.float64), np.asarray(other_lengths, dtype=np.float64)
    if not len(given) == len(own) == len(other):
        raise ValueError(f"{len(given)} outcomes, {len(own)} and {len(other)} lengths: give one of each per prompt")
    if not (min(own.min(), other.min()) >= 1):
        raise ValueError(f"a length is {min(own.min(), other.min())}, and must be at least 1: leave empty answers out")
    ratio = np.log(own / other)
    if not ratio.any():
        return win_rate(outcomes, confidence)
    design = np.stack([np.ones_like(ratio), ratio], 1)
    coefficients, covariance = logistic_fit(design, given)
    if covariance is None:
        return Estimate(float(expit(coefficients[0])), note="wins follow from the lengths alone: no interval")
    half = float(ndtri(0.5 + confidence / 2)) * np.sqrt(covariance[0, 0])
    low, high = expit(coefficients[0] - half), expit(coefficients[0] + half)
    return Estimate(float(expit(coefficients[0])), float(low), float(high))


def logistic_fit(
    design: Float[ndarray, "N P"], outcomes: Float[ndarray, " N"], steps: int = 50
) -> tuple[Float[ndarray, " P"], Float[ndarray, "P P"] | None]:
    """Maximum likelihood of P(win) = σ(design · coefficients), by Newton's method.

    Returns:
        The coefficients and their covariance, the inverse of the Fisher information; no covariance if the likelihood
        has no maximum, because a linear rule tells all outcomes apart.
    """
    coefficients = np.zeros(design.shape[1])
    for _ in range(steps):
        probability = expit(design @ coefficients)
        information = (design.T * (probability * (1 - probability))) @ design
        if abs(coefficients).max() > SEPARATED or np.linalg.cond(information) > 1e12:
            return coefficients, None
        step = np.linalg.solve(information, design.T @ (outcomes - probability))
        coefficients = coefficients + step
        if abs(step).max() < 1e-10:
            return coefficients, np.linalg.inv(information)
    return coefficients, None


def _checked(outcomes: Values) -> Float[ndarray, " N"]:
    given = np.asarray(outcomes, dtype=np.float64)
    if given.ndim != 1 or not len(given) or not ((given >= 0) & (given <= 1)).all():
        raise ValueError("outcomes must be numbers from 0 (a loss) to 1 (a win), at least one")
    return given
