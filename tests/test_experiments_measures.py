"""Win rates, bias probes, extrapolation and self-BLEU, against scipy, other formulas and numbers worked out by hand."""

import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import expit

from agents.evaluate import self_bleu
from agents.experiments.bias_probes import fill, paired_probe
from agents.experiments.extrapolation import extrapolate
from agents.experiments.statistics import detectable_effect, mean_of_runs
from agents.experiments.win_rates import length_controlled_win_rate, logistic_fit, win_rate, wins


def test_the_interval_of_a_win_rate_is_wilsons() -> None:
    outcomes = wins([1.0, 2.0, 0.0, 5.0], [0.0, 1.0, 0.0, 9.0])
    assert outcomes.tolist() == [1.0, 1.0, 0.5, 0.0]
    for won, count in ((7, 20), (0, 5), (30, 30)):
        expected = stats.binomtest(won, count).proportion_ci(0.95, method="wilson")
        found = win_rate([1.0] * won + [0.0] * (count - won))
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
        assert found.value == won / count
    with pytest.raises(ValueError, match="3 and 2 scores cannot be compared in pairs"):
        wins([1, 2, 3], [1, 2])


def test_a_win_rate_at_equal_lengths_is_the_maximum_of_the_likelihood() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.integers(5, 60, 400), rng.integers(5, 30, 400)
    ratio = np.log(own / other)
    outcomes = (rng.random(400) < expit(-0.4 + 1.5 * ratio)).astype(float)

    def loss(x: np.ndarray) -> float:
        p = expit(x[0] + x[1] * ratio)
        return -float(outcomes @ np.log(p) + (1 - outcomes) @ np.log1p(-p))

    best = optimize.minimize(loss, np.zeros(2), tol=1e-12)
    found = length_controlled_win_rate(outcomes.tolist(), own.tolist(), other.tolist())
    half = stats.norm.ppf(0.975) * math.sqrt(best.hess_inv[0, 0])
    assert found.value == pytest.approx(expit(best.x[0]), abs=1e-4)
    assert found.low == pytest.approx(expit(best.x[0] - half), abs=5e-3)
    assert found.high == pytest.approx(expit(best.x[0] + half), abs=5e-3)
    # Longer answers win: controlled for that, the side that is longer has lost ground.
    raw = win_rate(outcomes.tolist())
    assert found.high is not None
    assert raw.low is not None
    assert found.high < 0.5 < raw.low
    swapped = length_controlled_win_rate((1 - outcomes).tolist(), other.tolist(), own.tolist())
    assert swapped.value == pytest.approx(1 - found.value, abs=1e-9)


def test_lengths_that_explain_everything_or_nothing() -> None:
    told = length_controlled_win_rate([1, 1, 0, 0], [9, 8, 2, 3], [5, 5, 5, 5])
    assert told.low is None
    assert "lengths alone" in told.note
    equal = length_controlled_win_rate([1, 0, 1, 1], [4, 4, 4, 4], [4, 4, 4, 4])
    assert equal == win_rate([1, 0, 1, 1])
    with pytest.raises(ValueError, match="a length is 0"):
        length_controlled_win_rate([1, 0], [0, 3], [2, 2])
    assert logistic_fit(np.ones((4, 1)), np.array([1.0, 1.0, 1.0, 0.0]))[0] == pytest.approx([math.log(3)])


def test_a_probe_is_a_paired_t_test_over_templates() -> None:
    rng = np.random.default_rng(1)
    templates = [f"{{group}} is number {i}" for i in range(30)]
    scores = {text: rng.normal() for text in fill(templates, ("he", "she", "they"))}
    found = paired_probe(lambda texts: [scores[t] for t in texts], templates, ("he", "they"), ("she",))
    one = [(scores[f"he is number {i}"] + scores[f"they is number {i}"]) / 2 for i in range(30)]
    other = [scores[f"she is number {i}"] for i in range(30)]
    expected = stats.ttest_rel(one, other)
    interval = expected.confidence_interval(0.95)
    assert found.difference.p_value == pytest.approx(expected.pvalue)
    assert (found.difference.low, found.difference.high) == pytest.approx((interval.low, interval.high))
    assert found.pairs == pytest.approx(np.subtract(one, other))
    assert found.effect == pytest.approx(np.mean(found.pairs) / np.std([*scores.values()]), rel=0.2)


def test_a_probe_sees_a_planted_bias_and_none_where_none_is() -> None:
    """200 unbiased scores are called biased at p < 0.05 about ten times; a bias of one deviation at p < 0.01 always."""
    templates = [f"{{group}} is number {i}" for i in range(20)]
    rng, alarms = np.random.default_rng(0), 0
    found = paired_probe(lambda texts: [rng.normal() + ("she" not in t) for t in texts], templates, ["he"], ["she"])
    assert found.difference.p_value is not None
    assert found.difference.p_value < 0.01
    assert found.difference.value > 0, "the first group is favoured"
    for _ in range(200):
        found = paired_probe(lambda texts: rng.normal(size=len(texts)).tolist(), templates, ["he"], ["she"])
        alarms += (found.difference.p_value or 0.0) < 0.05
    assert 3 <= alarms <= 20
    with pytest.raises(ValueError, match=r"'he is' does not name a group: put \{group\}"):
        paired_probe(lambda texts: [0.0] * len(texts), ["he is", "{group} is"], ["he"], ["she"])


def test_an_extrapolation_is_least_squares_with_the_textbook_interval() -> None:
    """Against scipy's regression; and its band covers new runs as often as it says."""
    sizes, values = [1.0, 2.0, 5.0, 10.0, 10.0], [0.61, 0.63, 0.66, 0.68, 0.69]
    x = np.log(sizes)
    line: Any = stats.linregress(x, values)
    found = extrapolate(sizes, values, 100.0)
    assert found.value == pytest.approx(line.intercept + line.slope * math.log(100))
    residual = math.sqrt(sum((v - line.intercept - line.slope * a) ** 2 for v, a in zip(values, x, strict=True)) / 3)
    # The standard error of the mean response, from the errors of slope and intercept at the shifted origin.
    shifted: Any = stats.linregress(x - math.log(100), values)
    half = stats.t.ppf(0.95, 3) * math.hypot(residual, shifted.intercept_stderr)
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half))
    rng, inside = np.random.default_rng(0), 0
    for _ in range(1000):
        runs = [0.5 + 0.05 * math.log(size) + rng.normal(0, 0.01) for size in sizes]
        told = extrapolate(sizes, runs, 100.0)
        assert told.low is not None
        assert told.high is not None
        inside += told.low <= 0.5 + 0.05 * math.log(100) + rng.normal(0, 0.01) <= told.high
    assert 870 <= inside <= 930
    with pytest.raises(ValueError, match="at least three trial runs of at least two sizes"):
        extrapolate([1.0, 1.0, 1.0], [0.1, 0.2, 0.3], 10.0)


def plain_self_bleu(texts: list[str], n: int) -> float:
    """From the definition, text by text."""
    total = 0.0
    for i, text in enumerate(texts):
        words, others = text.split(), [other.split() for j, other in enumerate(texts) if j != i]
        product = 1.0
        for k in range(1, n + 1):

            def grams(row: list[str], k: int = k) -> Counter[str]:
                return Counter(" ".join(row[at : at + k]) for at in range(len(row) - k + 1))

            most = {gram: max(grams(other)[gram] for other in others) for gram in grams(words)}
            matched = sum(min(times, most[gram]) for gram, times in grams(words).items())
            product *= (matched + (k > 1)) / max(1, grams(words).total() + (k > 1))
        nearest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        penalty = 1.0 if nearest <= len(words) else math.exp(1 - nearest / len(words))
        total += penalty * product ** (1 / n)
    return total / len(texts)


def test_self_bleu_is_its_definition() -> None:
    assert self_bleu(["a b c d e"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b", "c d e", "f"]) == 0.0
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([*"abcde"], size=rng.integers(1, 12))) for _ in range(12)]
    for n in (1, 2, 4):
        assert self_bleu(texts, n) == pytest.approx(plain_self_bleu(texts, n))
    assert self_bleu(texts) == self_bleu(texts, 4)
    with pytest.raises(ValueError, match="1 of 3 have words: give at least two"):
        self_bleu(["a", "", " "])


def test_the_examples_of_the_page_run(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "measuring.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "docs/measuring.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5
    assert printed[0].startswith("0.583 [")
    assert f"{detectable_effect(5):.1f} standard deviations" in page
    assert f"ten seeds {detectable_effect(10):.1f}." in page


def test_the_smallest_effect_that_seeds_detect() -> None:
    """Cohen's and G*Power's values; and t tests of that effect succeed in 80 % of the cases."""
    assert detectable_effect(5) == pytest.approx(1.68, abs=0.01)
    assert detectable_effect(10) == pytest.approx(0.996, abs=0.002)
    assert detectable_effect(34) == pytest.approx(0.50, abs=0.01)
    rng = np.random.default_rng(0)
    found: Any = stats.ttest_1samp(rng.normal(detectable_effect(5), 1.0, (20_000, 5)), 0.0, axis=1)
    assert (found.pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.015)


def test_the_mean_of_runs_has_students_interval() -> None:
    values = [0.2, 0.5, 0.35, 0.9]
    found, error = mean_of_runs(values), np.std(values, ddof=1) / 2
    assert (found.low, found.high) == pytest.approx(stats.t.interval(0.95, 3, np.mean(values), error))
    assert mean_of_runs(values[:2]).low is None
    assert "do not differ" in mean_of_runs([1.0, 1.0, 1.0]).note
