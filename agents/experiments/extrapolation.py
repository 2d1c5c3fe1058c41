"""Extrapolation of trial runs: what a full run will reach, from runs on 1, 2, 5 and 10 % of the data."""

import math
from typing import Literal

import numpy as np
from scipy.special import stdtrit

from agents.experiments.statistics import Estimate
from agents.experiments.win_rates import Values

Scale = Literal["linear", "accuracy"]
"""What is a straight line in the logarithm of the size: the value; or log((a − ½) / (1 − a)) of an accuracy a, which
is −∞ at chance and ∞ at 1, so that the line can approach its ceiling."""


def extrapolate(
    sizes: Values, values: Values, size: float | int, confidence: float = 0.9, scale: Scale = "linear"
) -> Estimate:
    """The value to expect of one new run at `size`, with its prediction interval.

    Fits value = a + b log(size) by least squares; the interval is ŷ ± t s √(1 + 1/n + (x − x̄)² / Σ(x_i − x̄)²) with
    x = log(size) and n − 2 degrees of freedom (Draper & Smith 1998, "Applied regression analysis", section 3.1). It
    holds if the trend goes on. Accuracies that approach their ceiling bend: on the "linear" scale, the prediction is
    then too high. On the "accuracy" scale, a and the interval are fitted to the transformed values, and turned back.

    Args:
        sizes: numbers of examples of the trial runs; several runs may have the same size.
        values: what each reached, such as accuracy.
        size: number of examples of the full run.
        confidence: coverage of the interval.
        scale: "accuracy" for accuracies of pairs above ½, tested on labels without errors.

    Raises:
        ValueError: there are fewer than three runs or two sizes, a number is not positive or not finite, or an accuracy
            is not between ½ and 1.
    """
    if len(sizes) != len(values) or len(sizes) < 3 or len({*sizes}) < 2:
        raise ValueError(
            f"{len(sizes)} sizes and {len(values)} values: at least three trial runs of at least two sizes are needed"
        )
    if not all(math.isfinite(x) and x > 0 for x in (*sizes, size)) or not all(map(math.isfinite, values)):
        raise ValueError("sizes must be positive, and sizes and values finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, and must be between 0 and 1, such as 0.9")
    x, y, at = np.log(np.asarray(sizes, dtype=np.float64)), np.asarray(values, dtype=np.float64), math.log(size)
    if scale == "accuracy":
        if not ((y > 0.5) & (y < 1)).all():
            raise ValueError(f"accuracies from {y.min():g} to {y.max():g}: each must be above 0.5 and below 1")
        y = np.log((y - 0.5) / (1 - y))
    centred, degrees = x - x.mean(), len(x) - 2
    slope = float(centred @ y / (centred @ centred))
    expected = float(y.mean() + slope * (at - x.mean()))
    residuals = y - y.mean() - slope * centred
    variance = residuals @ residuals / degrees * (1 + 1 / len(x) + (at - x.mean()) ** 2 / (centred @ centred))
    half = float(stdtrit(degrees, 0.5 + confidence / 2) * math.sqrt(variance))
    value, low, high = expected, expected - half, expected + half
    if scale == "accuracy":
        value, low, high = (float(1 - 0.5 / (1 + np.exp(z))) for z in (value, low, high))
    return Estimate(value, low, high, float(degrees))
