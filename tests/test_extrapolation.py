"""The accuracy that is extrapolated from trial runs: against an integral on a grid, and on curves that are known."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from agents.experiments.extrapolation import CEILINGS, SPREADS, extrapolate_accuracy
from agents.pipeline.planning import ACCURACY_SHARES, LEAST_COMPARISONS

FORMS = (
    lambda y: 1 / (1 + np.exp(-y)),
    lambda y: 2 / np.pi * np.arctan(np.exp(y)),
    lambda y: 1 - np.exp(-np.exp(y)),
)


def probability_below(thresholds: list[float], sizes: list[int], accuracies: list[float], size: int, pairs: int):
    """How probable it is that the full run's accuracy is below each threshold: the model's integral, on a fine grid."""
    x = np.log(sizes)
    level, slope = np.meshgrid(np.linspace(-9, 9, 145), np.linspace(-0.7, 1.7, 49))
    prior = stats.norm.pdf(level, 0, 2) * stats.norm.pdf(slope, 0.5, 0.3)
    total, below = 0.0, np.zeros(len(thresholds))
    for form in FORMS:
        at_trials = form(level[..., None] + slope[..., None] * (x - x.mean()))
        at_full = form(level + slope * (np.log(size) - x.mean()))
        for ceiling in CEILINGS:
            told, full = 0.5 + (ceiling - 0.5) * at_trials, 0.5 + (ceiling - 0.5) * at_full
            for kappa in SPREADS:
                noise, last = (
                    np.sqrt(np.maximum(a * (1 - a), 1 / pairs) * (1 / pairs + kappa / np.array(n)))
                    for a, n in ((told, sizes), (full, size))
                )
                weight = prior * stats.norm.pdf(accuracies, told, noise).prod(-1) * (1 if ceiling == 1 else 1 / 31)
                total += weight.sum()
                below += [(weight * stats.norm.cdf(threshold, full, last)).sum() for threshold in thresholds]
    return below / total


@pytest.mark.parametrize(
    ("accuracies", "pairs"),
    [
        ([0.55, 0.59, 0.57, 0.64, 0.61, 0.68, 0.73], 400),
        ([0.68, 0.70, 0.69, 0.71, 0.71, 0.73, 0.72], 1000),
        ([0.50, 0.53, 0.49, 0.51, 0.48, 0.52, 0.55], 150),
    ],
)
def test_the_band_is_that_of_an_integral_on_a_grid(accuracies: list[float], pairs: int) -> None:
    sizes = [20, 20, 20, 40, 40, 100, 200]
    told = extrapolate_accuracy(sizes, accuracies, 2000, pairs)
    assert told.low is not None
    assert told.high is not None
    step = 1 / pairs  # the bounds are multiples of it
    wanted = [told.low, told.low + step, told.value, told.high - step, told.high]
    low, within_low, middle, within_high, high = probability_below(wanted, sizes, accuracies, 2000, pairs)
    assert low < 0.06
    assert within_low > 0.04
    assert middle == pytest.approx(0.5, abs=0.03)
    assert within_high < 0.96
    assert high > 0.94


# Curves whose truth is known -----------------------------------------------------------------------------------------

SHAPES: dict[str, Callable[[np.random.Generator, float], Callable[[np.ndarray], np.ndarray]]] = {
    "power law of the error": lambda rng, half: (
        lambda s: lambda n: 1 - (1 + n * (2 ** (1 / s) - 1) / half) ** -s
    )(rng.uniform(0.2, 1.0)),
    "order of noisy scores": lambda rng, half: (
        lambda s: lambda n: 2 / np.pi * np.arctan((n / half) ** s)
    )(rng.uniform(0.35, 0.65)),
    "odds": lambda rng, half: (lambda s: lambda n: 1 / (1 + (half / n) ** s))(rng.uniform(0.3, 1.0)),
    "exponential": lambda rng, half: (lambda s: lambda n: 1 - 0.5 ** ((n / half) ** s))(rng.uniform(0.3, 0.8)),
    "line, then the ceiling": lambda rng, half: (
        lambda b: lambda n: np.clip(0.5 + b * np.log2(n / half), 0, 1)
    )(rng.uniform(0.02, 0.08)),
}  # fmt: skip
"""Ways from 0 to 1 that pass ½ at `half` comparisons; their other numbers are drawn."""


def trials(rng: np.random.Generator, shape: str) -> tuple[list[float], list[float], int, float, int]:
    """Sizes and accuracies of the planner's trials, the size and accuracy of the full run, and the held-out pairs.

    Of ten tests, three have no wrong labels. Runs differ by their part of the data, and all are tested on the same
    pairs, which are easy or hard for all of them.
    """
    full, pairs = round(10 ** rng.uniform(3, 5)), round(10 ** rng.uniform(2, 4))
    ceiling = 1.0 if rng.random() < 0.3 else rng.uniform(0.65, 1.0)
    rise = SHAPES[shape](rng, full * 10 ** rng.uniform(-3, 0.3))
    sizes = np.maximum(LEAST_COMPARISONS, np.round(full * np.array([*ACCURACY_SHARES, 1.0])))
    a = 0.5 + (ceiling - 0.5) * rise(sizes)
    of_training = np.minimum(rng.uniform(0, 0.5) / np.sqrt(sizes), 0.5 * (a - 0.5) + 0.002)
    shared = rng.uniform(0, 0.7)
    of_test = np.sqrt(shared) * rng.normal() + np.sqrt(1 - shared) * rng.normal(size=len(a))
    a = a + of_training * rng.normal(size=len(a)) + np.sqrt(a * (1 - a) / pairs) * of_test
    a = np.clip(np.round(a * pairs) / pairs, 0, 1)
    return sizes[:-1].tolist(), a[:-1].tolist(), full, float(a[-1]), pairs


def test_the_band_holds_in_ninety_of_a_hundred_curves_of_any_form() -> None:
    """And it is narrower, the more the trials say."""
    held: dict[str, list[bool]] = {shape: [] for shape in SHAPES}
    widths, informed = [], []
    for i, shape in enumerate(SHAPES):
        rng = np.random.default_rng(np.random.SeedSequence((17, i)))
        for _ in range(100):
            sizes, accuracies, full, accuracy, pairs = trials(rng, shape)
            told = extrapolate_accuracy(sizes, accuracies, full, pairs)
            low, high = told.low or 0.0, told.high or 1.0
            held[shape].append(low <= accuracy <= high)
            widths.append(high - low)
            if pairs > 1000 and accuracies[-1] > 0.65:
                informed.append(widths[-1])
    print({shape: float(np.mean(those)) for shape, those in held.items()})
    print([float(np.mean(x)) for x in (widths, informed)])
    assert 0.85 <= np.mean(list(held.values())) <= 0.97
    assert min(np.mean(those) for those in held.values()) >= 0.8
    assert np.mean(widths) < 0.19
    assert np.mean(informed) < 0.15


def test_trials_that_say_all_leave_a_narrow_band() -> None:
    sizes = [20, 20, 20, 40, 40, 100, 200]
    at = [1 - 0.5 / (1 + np.exp(-1 + 0.5 * np.log(n))) for n in [*sizes, 400]]
    told = extrapolate_accuracy(sizes, at[:-1], 400, 10**6)
    assert told.value == pytest.approx(at[-1], abs=0.005)
    narrow = extrapolate_accuracy(sizes, at[:-1], 400, 10**6, confidence=0.5)
    assert (told.low or 0) < (narrow.low or 0) < narrow.value == told.value < (narrow.high or 1) < (told.high or 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"accuracies": [0.6, 1.2, 0.7]}, r"accuracies from 0\.6 to 1\.2: each must be from 0 to 1"),
        ({"pairs": 0}, "no held-out pairs"),
        ({"sizes": [10, 10, 10]}, "at least three trial runs of at least two sizes"),
        ({"sizes": [10, 20]}, "2 sizes and 3 values"),
        ({"accuracies": [0.6, float("nan"), 0.7]}, "finite"),
        ({"size": 0}, "must be positive"),
        ({"confidence": 90.0}, "such as 0.9"),
    ],
)
def test_what_cannot_be_extrapolated_is_refused(change: dict[str, object], said: str) -> None:
    given = {"sizes": [10, 20, 40], "accuracies": [0.6, 0.65, 0.7], "size": 400, "pairs": 100}
    with pytest.raises(ValueError, match=said):
        extrapolate_accuracy(**(given | change))  # pyright: ignore[reportArgumentType]
