"""Extrapolation of trial runs: what a full run will reach, from runs on 1, 2, 5 and 10 % of the data."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from agents.experiments.statistics import Estimate


def extrapolate(sizes: Sequence[float], values: Sequence[float], size: float, confidence: float = 0.9) -> Estimate:
    """The value to expect of one new run at `size`, with its prediction interval.

    Fits value = a + b log(size) by least squares; the interval is ŷ ± t s √(1 + 1/n + (x − x̄)² / Σ(x_i − x̄)²) with
    x = log(size) and n − 2 degrees of freedom (Draper & Smith 1998, "Applied regression analysis", section 3.1). It
    holds if the trend goes on: accuracies that approach a ceiling bend before they reach it, and are then below it.

    Args:
        sizes: numbers of examples of the trial runs; several runs may have the same size.
        values: what each reached, such as accuracy.
        size: number of examples of the full run.
        confidence: coverage of the interval.

    Raises:
        ValueError: there are fewer than three runs or two sizes, or a number is not positive or not finite.
    """
    if len(sizes) != len(values) or len(sizes) < 3 or len(set(sizes)) < 2:
        raise ValueError(
            f"{len(sizes)} sizes and {len(values)} values: at least three trial runs of at least two sizes are needed"
        )
    if not all(math.isfinite(x) and x > 0 for x in (*sizes, size)) or not all(map(math.isfinite, values)):
        raise ValueError("sizes must be positive, and sizes and values finite")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence!r}, and must be between 0 and 1, such as 0.9")
    x, y, at = np.log(np.asarray(sizes, dtype=np.float64)), np.asarray(values, dtype=np.float64), math.log(size)
    centred, degrees = x - x.mean(), len(x) - 2
    slope = float(centred @ y / (centred @ centred))
    expected = float(y.mean() + slope * (at - x.mean()))
    residuals = y - y.mean() - slope * centred
    variance = residuals @ residuals / degrees * (1 + 1 / len(x) + (at - x.mean()) ** 2 / (centred @ centred))
    half = float(stdtrit(degrees, 0.5 + confidence / 2) * math.sqrt(variance))
    return Estimate(expected, expected - half, expected + half, float(degrees))
