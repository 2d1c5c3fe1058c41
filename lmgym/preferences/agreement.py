"""How far labels can be trusted: agreement between labellers, consistency, side bias and error rate, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Level = Literal["nominal", "ordinal", "interval"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Figure:
    """An estimate with its 95 % interval.

    Attributes:
        value: NaN where there are no data.
        low, high: the bounds.
        count: the number of observations (labels, pairs of labels, or items) that it rests on.
    """

    value: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        if not self.count or math.isnan(self.value):
            return "no data yet"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.count})"


NOTHING = Figure(math.nan, math.nan, math.nan, 0)


def wilson(successes: int, count: int) -> Figure:
    """The share of successes with Wilson's score interval."""
    return NOTHING if count == 0 else Figure(successes / count, *wilson_interval(successes / count, count), count)


def wilson_interval(share: float, count: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The bounds of Wilson's score interval, (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n).

    Wilson 1927 (https://doi.org/10.1080/01621459.1927.10502953).

    Args:
        share: p, of successes.
        count: n, at least 1.
        confidence: coverage of the interval.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def side_bias(left: int, decided: int) -> Figure:
    """The side bias b: the share of answers that are "left" whatever the texts are (negative: "right").

    Sides are drawn evenly, so that P(left) = (1 + b) / 2. The bounds are Wilson's, moved to b.

    Args:
        left: answers "left".
        decided: answers "left" or "right".
    """
    share = wilson(left, decided)
    if not share.count:
        return NOTHING
    return Figure(2 * share.value - 1, 2 * share.low - 1, 2 * share.high - 1, decided)


def error_rate(known: Sequence[tuple[bool, bool]]) -> Figure:
    """The rate ε of wrong answers of a labeller who otherwise answers by a side alone, from items with a known answer.

    Of answers to the side against which the labeller is biased, none is due to the bias, and the share ε is wrong. So
    these alone are counted, with Wilson's interval: exact given their number. Without a bias it uses half of the
    answers.

    Args:
        known: for each answer, whether the better text was on the left, and whether the answer was "left".
    """
    left = sum(answer for _, answer in known)
    honest = 2 * left < len(known)  # with a bias to the right, the answers "left"
    counted = [better == answer for better, answer in known if answer == honest]
    return wilson(len(counted) - sum(counted), len(counted))


def cohen_kappa(first: Sequence[object], second: Sequence[object]) -> float:
    """κ = (p_o − p_e) / (1 − p_e): the agreement of two labellers on the same items beyond chance.

    p_o is the share of equal answers, p_e what the labellers' own frequencies give by chance. NaN if both always give
    the same answer. Cohen 1960 (https://doi.org/10.1177/001316446002000104).
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} answers of one labeller and {len(second)} of the other: give one each per item")
    if not len(first):
        return math.nan
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    by_chance = sum(first.count(answer) * second.count(answer) for answer in set(first)) / len(first) ** 2
    return math.nan if by_chance == 1 else (observed - by_chance) / (1 - by_chance)


def krippendorff_alpha(ratings: Float[ndarray, "labellers items"], level: Level = "nominal") -> float:
    """α = 1 − D_observed / D_expected: the agreement of any number of labellers, with missing answers.

    Krippendorff 2011, "Computing Krippendorff's alpha-reliability" (https://repository.upenn.edu/asc_papers/43).

    Args:
        ratings: numbers; NaN where a labeller did not answer.
        level: what a difference of two ratings means; see `_differences`.

    Returns:
        NaN if no item has two answers, or all answers are equal.
    """
    coincidences, values = _coincidences(ratings)
    if not len(coincidences):
        return math.nan
    return float(_alpha(coincidences.sum(0)[None], values, level)[0])


def alpha_with_interval(
    ratings: Float[ndarray, "labellers items"], level: Level = "nominal", samples: int = 1000, seed: int = 0
) -> Figure:
    """α with a percentile interval from a bootstrap over items (those with two answers or more).

    Args:
        ratings: as for `krippendorff_alpha`.
        level: as for `krippendorff_alpha`.
        samples: of the bootstrap.
        seed: of its random numbers.
    """
    coincidences, values = _coincidences(ratings)
    items = len(coincidences)
    if items < 2:
        return Figure(krippendorff_alpha(ratings, level), math.nan, math.nan, items)
    weights = np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), samples)
    drawn = _alpha(np.tensordot(weights.astype(float), coincidences, 1), values, level)
    drawn = drawn[np.isfinite(drawn)]
    tails = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)
    low, high = np.quantile(drawn, tails) if len(drawn) else (math.nan, math.nan)
    return Figure(krippendorff_alpha(ratings, level), float(low), float(high), items)


def _coincidences(
    ratings: Float[ndarray, "labellers items"],
) -> tuple[Float[ndarray, "units C C"], Float[ndarray, " C"]]:
    """For each item with m ≥ 2 answers, how often values c and k are paired, divided by m − 1; and the values."""
    values = np.unique(ratings[np.isfinite(ratings)])
    counts = (ratings.T[:, :, None] == values).sum(1).astype(float)
    counts = counts[counts.sum(1) >= 2]
    pairs = counts[:, :, None] * counts[:, None] - counts[:, :, None] * np.eye(len(values))
    return pairs / (counts.sum(1) - 1)[:, None, None], values


def _alpha(o: Float[ndarray, "B C C"], values: Float[ndarray, " C"], level: Level) -> Float[ndarray, " B"]:
    frequency = o.sum(2)
    total = frequency.sum(1)
    difference = _differences(frequency, values, level)
    observed = (o * difference).sum((1, 2))
    expected = (frequency[:, :, None] * frequency[:, None] * difference).sum((1, 2))
    return 1 - np.divide((total - 1) * observed, expected, out=np.full(len(o), np.nan), where=expected > 0)


def _differences(
    frequency: Float[ndarray, "B C"], values: Float[ndarray, " C"], level: Level
) -> Float[ndarray, "b C C"]:
    """δ²: nominal, 1 unless equal; interval, (c − k)²; ordinal, (how often values from c to k occur, half of both)²."""
    if level == "nominal":
        return (1 - np.eye(len(values)))[None]
    if level == "interval":
        return ((values[:, None] - values) ** 2)[None]
    middle = np.cumsum(frequency, 1) - frequency / 2
    return (middle[:, :, None] - middle[:, None]) ** 2
