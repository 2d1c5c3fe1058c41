"""Intervals cover what they claim, on the noise that RL has; and the numbers are those of scipy and of rliable."""

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from scipy import stats

from agents.experiments import statistics
from agents.experiments.cells import run_seed
from agents.experiments.statistics import (
    Scores,
    collect_scores,
    holm,
    interquartile_mean,
    mean_improvement,
    normalised,
    performance_profile,
    permutation_p_value,
    probability_of_improvement,
    stratified_mean,
    suite_difference,
    suite_mean,
    t_interval,
)

REPLICATIONS = 4000
TASKS = statistics.MIN_TASKS
RNG = np.random.Generator
SHAPES: dict[str, Callable[[RNG, int], np.ndarray]] = {
    "normal": lambda rng, n: rng.normal(0.6, 0.1, n),
    "uniform": lambda rng, n: rng.uniform(0.3, 0.9, n),
    "skewed": lambda rng, n: 0.3 + rng.exponential(0.1, n),
    "heavy tails": lambda rng, n: 0.5 + 0.05 * rng.standard_t(5, n),
    "one seed in ten collapses": lambda rng, n: np.where(np.arange(n) < n // 10, 0.0, rng.normal(0.8, 0.05, n)),
    "solved or not": lambda rng, n: rng.choice([0.2, 0.9], n) + rng.normal(0, 0.03, n),
    "close to the best": lambda rng, n: np.minimum(1.0, rng.normal(0.95, 0.1, n)),
    "few values": lambda rng, n: rng.integers(0, 5, n) / 4,
}
SEEDS = (3, 5, 10)
SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def populations(shape: str, rng: RNG, tasks: int = TASKS, shift: float = 0.0) -> list[np.ndarray]:
    """For each task, all the scores that a run can have, equally likely: their mean is known exactly."""
    return [SHAPES[shape](rng, 2000) * scale - shift for scale in np.linspace(0.75, 1.25, tasks)]


def draw(tasks: list[np.ndarray], rng: RNG, seeds: int) -> list[np.ndarray]:
    return [rng.choice(scores, (REPLICATIONS, seeds)) for scores in tasks]


def covers(estimate: tuple[Any, Any, Any], truth: float) -> np.ndarray:
    low, high = t_interval(*estimate, 0.95)
    return np.asarray((low <= truth) & (truth <= high))


def coverage(estimate: tuple[Any, Any, Any], truth: float) -> float:
    return float(covers(estimate, truth).mean())


def as_scores(tasks: list[np.ndarray]) -> Scores:
    return {f"task{t}": {i: float(x) for i, x in enumerate(scores)} for t, scores in enumerate(tasks)}


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_of_the_suite_mean(shape: str) -> None:
    rng = np.random.default_rng(1)
    tasks = populations(shape, rng)
    truth = float(np.mean([scores.mean() for scores in tasks]))
    for seeds in SEEDS:
        assert 0.93 <= coverage(stratified_mean(draw(tasks, rng, seeds)), truth) <= 0.97, seeds


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_of_a_paired_difference(shape: str) -> None:
    """Both agents share what a seed makes easy, and each has noise of its own."""
    rng = np.random.default_rng(2)
    tasks, easy = populations(shape, rng), populations("normal", rng)
    other = populations("skewed", rng)
    truth = float(np.mean([x.mean() - y.mean() for x, y in zip(tasks, other, strict=True)]))
    for seeds in SEEDS:
        shared = draw(easy, rng, seeds)
        one = [x + s for x, s in zip(draw(tasks, rng, seeds), shared, strict=True)]
        two = [y + s for y, s in zip(draw(other, rng, seeds), shared, strict=True)]
        differences = [x - y for x, y in zip(one, two, strict=True)]
        assert 0.93 <= coverage(stratified_mean(differences), truth) <= 0.97, seeds


def true_improvement(tasks: list[np.ndarray], other: list[np.ndarray]) -> float:
    """P(X > Y) + ½ P(X = Y) of two populations, counted."""
    below = [np.searchsorted(np.sort(y), x, side) for x, y in zip(tasks, other, strict=True) for side in SIDES]
    return float(np.mean(below)) / len(other[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_of_the_probability_of_improvement(shape: str) -> None:
    """Of the intervals that are shown, 93 % or more cover; and as many as claimed where nearly all are shown."""
    rng = np.random.default_rng(3)
    for shift in (0.0, 0.05, 0.2):
        tasks, other = populations(shape, rng), populations(shape, rng, shift=shift)
        truth = true_improvement(tasks, other)
        for seeds in SEEDS:
            estimate = mean_improvement(list(zip(draw(tasks, rng, seeds), draw(other, rng, seeds), strict=True)))
            value = np.asarray(estimate[0])
            shown = (value >= statistics.EXTREME) & (value <= 1 - statistics.EXTREME)
            missed = shown & ~covers(estimate, truth)
            assert missed.mean() <= 0.07, (shift, seeds, "false claims")
            if shown.mean() > 0.99:
                assert 0.93 <= 1 - missed.sum() / shown.sum() <= 0.975, (shift, seeds)


def test_the_intervals_that_are_left_out_would_not_cover() -> None:
    """One task, few tasks, a probability close to 1, and one seed for all tasks."""
    rng = np.random.default_rng(4)
    for tasks, seeds, most in ((1, 10, 0.75), (4, 3, 0.85)):
        scores = populations("one seed in ten collapses", rng, tasks)
        truth = float(np.mean([task.mean() for task in scores]))
        assert coverage(stratified_mean(draw(scores, rng, seeds)), truth) < most
    high, low = populations("close to the best", rng), populations("close to the best", rng, shift=0.25)
    truth = true_improvement(high, low)
    pairs = list(zip(draw(high, rng, 3), draw(low, rng, 3), strict=True))
    assert truth > 0.95
    assert coverage(mean_improvement(pairs), truth) < 0.85
    shared = rng.normal(0, 1, (REPLICATIONS, 5))
    assert coverage(stratified_mean([shared + rng.normal(0, 0.3, shared.shape) for _ in range(TASKS)]), 0.0) < 0.6


def test_a_suite_of_one_or_two_tasks_has_the_intervals_of_scipy() -> None:
    """One task: the t test. Two: Welch's test of two samples, for a mean is half a difference with the sign turned."""
    rng = np.random.default_rng(5)
    x, y = rng.normal(0, 1, 4), rng.normal(0, 3, 9)
    one = stats.ttest_1samp(x, 0.0).confidence_interval(0.9)
    assert t_interval(*stratified_mean([x]), 0.9) == pytest.approx((one.low, one.high), abs=1e-12)
    two: Any = stats.ttest_ind(x, -y, equal_var=False)
    interval = two.confidence_interval(0.95)
    value, variance, degrees = stratified_mean([x, y])
    assert t_interval(value, variance, degrees, 0.95) == pytest.approx((interval.low / 2, interval.high / 2), abs=1e-12)
    assert degrees == pytest.approx(two.df, abs=1e-9)


def test_one_task_has_the_statistic_of_brunner_and_munzel() -> None:
    rng = np.random.default_rng(6)
    x, y = rng.integers(0, 6, 8) / 5, rng.integers(0, 5, 6) / 5
    value, variance, degrees = mean_improvement([(x, y)])
    found = stats.brunnermunzel(x, y, alternative="two-sided", distribution="t")
    assert (0.5 - value) / np.sqrt(variance) == pytest.approx(found.statistic, abs=1e-9)
    assert 2 * stats.t.sf(abs(value - 0.5) / np.sqrt(variance), degrees) == pytest.approx(found.pvalue, abs=1e-9)


def as_rliable_defines_it(x: np.ndarray, y: np.ndarray) -> float:
    """P(X > Y) averaged over tasks, by Mann and Whitney's U; x and y are [runs, tasks]."""
    u = [stats.mannwhitneyu(x[:, t], y[:, t], alternative="greater").statistic for t in range(x.shape[1])]
    return float(np.mean(u)) / (len(x) * len(y))


@pytest.mark.parametrize("values", [3, 10**6])
def test_the_probability_of_improvement_is_that_of_rliable(values: int) -> None:
    rng = np.random.default_rng(7)
    x, y = rng.integers(0, values, (7, 12)) / values, rng.integers(0, values, (5, 12)) / values
    found = probability_of_improvement(as_scores(list(x.T)), as_scores(list(y.T)))
    assert found.value == pytest.approx(as_rliable_defines_it(x, y), abs=1e-9)
    back = probability_of_improvement(as_scores(list(y.T)), as_scores(list(x.T)))
    assert found.value + back.value == pytest.approx(1.0, abs=1e-12)
    assert found.low is not None
    assert back.high is not None
    assert found.low + back.high == pytest.approx(1.0, abs=1e-12)


def test_what_a_table_shows_is_what_was_tested() -> None:
    rng = np.random.default_rng(8)
    x, y = ([rng.normal(0.5, 0.2, 4 + t % 3) for t in range(TASKS)] for _ in range(2))
    for found, tasks in (
        (suite_mean(as_scores(x)), x),
        (suite_difference(as_scores(x), as_scores(y)), [a - b for a, b in zip(x, y, strict=True)]),
    ):
        expected = t_interval(*stratified_mean(tasks), 0.95)
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-12)
        assert str(found) == f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    narrow = suite_mean(as_scores(x), confidence=0.5)
    assert narrow.low is not None
    assert found.low is not None
    assert narrow.p_value is None
    # The p-value is 0.05 where the interval ends at 0.
    shifted = [a - found.low for a in x]
    assert suite_difference(as_scores(shifted), as_scores(y)).p_value == pytest.approx(0.05, abs=1e-9)
    reordered = {task: dict(list(seeds.items())[::-1]) for task, seeds in list(as_scores(y).items())[::-1]}
    assert suite_difference(as_scores(x), reordered) == found, "pairs are made by name, not by order"


@pytest.mark.parametrize(
    ("tasks", "seeds", "note"),
    [(1, 10, "a single task"), (TASKS - 1, 10, f"{TASKS - 1} tasks"), (TASKS, 2, "2 seeds"), (TASKS, 1, "1 seeds")],
)
def test_no_interval_without_enough(tasks: int, seeds: int, note: str) -> None:
    rng = np.random.default_rng(9)
    x, y = rng.normal(0, 1, (tasks, seeds)), rng.normal(0, 1, (tasks, seeds))
    one, other = as_scores(list(x)), as_scores(list(y))
    for found in (suite_mean(one), suite_difference(one, other), probability_of_improvement(one, other)):
        assert (found.low, found.high, found.p_value) == (None, None, None)
        assert found.note.startswith(note)
    assert suite_mean(one).value == pytest.approx(x.mean())
    assert str(suite_mean(one)) == f"{x.mean():.3f}"


def test_no_interval_where_nothing_varies_or_one_always_wins() -> None:
    same = as_scores([np.ones(5)] * TASKS)
    assert suite_mean(same).low is None
    assert "do not differ" in suite_mean(same).note
    worse = as_scores([np.arange(5) / 10] * TASKS)
    found = probability_of_improvement(same, worse)
    assert (found.value, found.low) == (1.0, None)
    assert "almost every run" in found.note


def test_the_interquartile_mean_and_the_profile() -> None:
    rng = np.random.default_rng(10)
    for runs in (3, 4, 7):
        x = rng.normal(0, 1, (runs, 5))
        assert interquartile_mean(as_scores(list(x.T))) == pytest.approx(stats.trim_mean(x.ravel(), 0.25), abs=1e-12)
    profile = performance_profile({"a": {0: 0.0, 1: 1.0}, "b": {0: 0.5, 1: 0.5, 2: 1.0, 3: 1.0}}, [-1.0, 0.0, 0.5, 1.0])
    assert profile == pytest.approx([1.0, 0.75, 0.5, 0.0])


def test_the_permutation_test_is_that_of_scipy() -> None:
    rng = np.random.default_rng(11)

    def difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return abs(x.mean(axis) - y.mean(axis))

    for n, m, values in ((3, 3, 4), (5, 4, 3), (6, 6, 10**6)):
        x, y = rng.integers(0, values, n) / values + 0.3, rng.integers(0, values, m) / values
        expected = stats.permutation_test((x, y), difference, n_resamples=10**6, alternative="greater").pvalue
        found = permutation_p_value(*({i: float(s) for i, s in enumerate(scores)} for scores in (x, y)))
        assert found == pytest.approx(expected, abs=1e-12)
    apart = [dict.fromkeys(range(10), 1.0) | {0: 1.1}, dict.fromkeys(range(10), 0.0)]
    assert permutation_p_value(*apart) == pytest.approx(2 / math.comb(20, 10), abs=1e-12)
    rng = np.random.default_rng(1)
    many = [{i: float(s) for i, s in enumerate(rng.normal(mean, 1, 15))} for mean in (0.0, 0.7)]
    by_t: Any = stats.ttest_ind(*(list(scores.values()) for scores in many))
    assert permutation_p_value(*many) == pytest.approx(by_t.pvalue, abs=0.005), (
        "drawn, because there are too many divisions"
    )
    with pytest.raises(ValueError, match="one agent has no scores"):
        permutation_p_value({}, {0: 1.0})


@pytest.mark.parametrize("seed", range(20))
def test_holm_is_the_closure_of_bonferroni(seed: int) -> None:
    """The closed test: a hypothesis is as significant as the least significant set of hypotheses that it is in."""
    rng = np.random.default_rng(seed)
    p = [*(rng.random(5) ** 4).tolist(), 0.01, 0.01]
    sets = [s for size in range(1, 8) for s in itertools.combinations(range(7), size)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(7)]
    assert holm(p) == pytest.approx(closed, abs=1e-12)
    assert holm([]) == []


def test_run_seeds_differ_between_tasks_and_never_change() -> None:
    assert run_seed("Tree", 0) == 3555614422
    seeds = {run_seed(task, index) for task in ("Tree", "Bandit", "First") for index in range(100)}
    assert len(seeds) == 300
    assert max(seeds) < 2**32


def test_normalised_scores() -> None:
    assert [normalised(s, -1.0, 3.0) for s in (-1.0, 3.0, 1.0, -3.0)] == [0.0, 1.0, 0.5, -0.5]
    with pytest.raises(ValueError, match="must be above the reference's"):
        normalised(0.5, 1.0, 1.0)
    with pytest.raises(ValueError, match="must be finite"):
        normalised(math.nan, 0.0, 1.0)


RUNS = [(task, index, 0.5) for task in ("a", "b") for index in range(3)]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        (RUNS[:-1], "PPO: 1 of 6 results are missing, the first is b, seed 2"),
        ([*RUNS, RUNS[0]], "PPO on a, seed 0: there are two results"),
        ([*RUNS[:-1], ("b", 2, math.nan)], "PPO on b, seed 2: the score is nan"),
        ([*RUNS, ("c", 0, 1.0)], "PPO on c, seed 0: not in this suite, whose tasks are a, b with seeds 0-2"),
        ([*RUNS, ("a", 3, 1.0)], "PPO on a, seed 3: not in this suite"),
    ],
)
def test_incomplete_results_are_refused(runs: list[tuple[str, int, float]], message: str) -> None:
    assert collect_scores(RUNS, ["a", "b"], 3) == {"a": dict.fromkeys(range(3), 0.5), "b": dict.fromkeys(range(3), 0.5)}
    with pytest.raises(ValueError, match=message):
        collect_scores(runs, ["a", "b"], 3, "PPO")


def test_scores_that_cannot_be_compared_are_refused() -> None:
    good = {"a": {0: 1.0, 1: 2.0}}
    for wrong, message in (
        ({}, "at least one task"),
        ({"a": {}}, "a has no scores"),
        ({"a": {0: math.inf, 1: 0.0}}, "a, seed 0: the score is inf"),
        ({"b": {0: 1.0, 1: 2.0}}, "only one of the two agents has scores on a"),
    ):
        for compare in (suite_difference, probability_of_improvement):
            with pytest.raises(ValueError, match=message):
                compare(good, wrong)
    with pytest.raises(ValueError, match="only one of the two agents has seed 1; a paired difference needs both"):
        suite_difference(good, {"a": {0: 1.0, 2: 2.0}})
    with pytest.raises(ValueError, match=r"confidence is 95\.0"):
        suite_mean(as_scores([np.arange(3.0)] * TASKS), confidence=95.0)
    with pytest.raises(ValueError, match=r"a p-value is 1\.5"):
        holm([0.5, 1.5])


def test_the_example_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "benchmark.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(from agents.experiments import statistics.*?)^```$", page, re.M | re.S)
    exec(compile(block, "docs/benchmark.md", "exec"), {"__name__": "__main__"})
    *intervals, note = capsys.readouterr().out.splitlines()
    assert len(intervals) == 3
    assert all(re.fullmatch(r"0\.\d{3} \[-?0\.\d{3}, 0\.\d{3}\]", line) for line in intervals), intervals
    assert note.startswith("a single task")
    assert f"fewer than {statistics.MIN_TASKS} tasks" in page
    assert f"fewer than {statistics.MIN_SEEDS} seeds" in page
    assert f"below {statistics.EXTREME} or above {1 - statistics.EXTREME}" in page
