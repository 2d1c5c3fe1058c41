"""Figures of labels against published examples, scipy and simulated labellers; choices have their propensities."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from lmgym.preferences import (
    Asker,
    LabelStore,
    Rules,
    SimulatedLabeller,
    cohen_kappa,
    error_rate,
    krippendorff_alpha,
    label_stats,
    side_bias,
    wilson,
)
from lmgym.preferences.agreement import alpha_with_interval
from lmgym.preferences.queries import choose, disagreement, margin, propensities

# Figures --------------------------------------------------------------------------------------------------------------


NAN = math.nan
PUBLISHED = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
        [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
    ]
)
"""Four observers and twelve units: Krippendorff 2011, "Computing Krippendorff's alpha-reliability", example C."""


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_is_that_of_the_published_example(level: Any, published: float) -> None:
    assert krippendorff_alpha(PUBLISHED, level) == pytest.approx(published, abs=5e-4)
    figure = alpha_with_interval(PUBLISHED, level)
    assert figure.low < published < figure.high
    assert figure.count == 11


def test_kappa_by_hand() -> None:
    """20 and 15 equal answers, 5 and 10 different ones: p_o = .7, p_e = .5, κ = .4."""
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert math.isnan(cohen_kappa(["yes"], ["yes"]))


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (3, 7), (50, 100), (199, 200)])
def test_wilson_is_scipy_s(successes: int, count: int) -> None:
    expected = binomtest(successes, count).proportion_ci(method="wilson")
    found = wilson(successes, count)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("rate", "bias"), [(0.1, 0.2), (0.25, -0.3)])
def test_the_intervals_recover_error_rate_and_side_bias(rate: float, bias: float) -> None:
    """4,000 simulated runs of 200 gold items: the 95 % intervals hold the truth 93.5 to 96.5 % of the time."""
    rng, labeller = np.random.default_rng(0), SimulatedLabeller(rate, bias)
    covered = np.zeros(2)
    for _ in range(4000):
        # The same answers as labeller.choose would give, all at once; the next test compares the two.
        known = _answers(labeller, 200, rng)
        e, b = error_rate(known), side_bias(sum(left for _, left in known), 200)
        covered += (e.low <= rate <= e.high, b.low <= bias <= b.high)
    assert ((covered / 4000 > 0.935) & (covered / 4000 < 0.965)).all(), covered / 4000


def _answers(labeller: SimulatedLabeller, count: int, rng: np.random.Generator) -> list[tuple[bool, bool]]:
    better_left = rng.random(count) < 0.5
    by_side = rng.random(count) < abs(labeller.side_bias)
    wrong = rng.random(count) < labeller.error_rate
    left = np.where(by_side, labeller.side_bias > 0, better_left != wrong)
    return list(zip(better_left.tolist(), left.tolist(), strict=True))


def test_simulated_labellers_answer_as_they_say() -> None:
    rng = np.random.default_rng(0)
    labeller = SimulatedLabeller(0.1, 0.3)
    counts = Counter(
        (side, str(labeller.choose([1.0, 0.0] if side else [0.0, 1.0], rng)["choice"])) for side in (True, False) * 4000
    )
    assert counts[True, "left"] / 4000 == pytest.approx(0.3 + 0.7 * 0.9, abs=0.02)
    assert counts[False, "left"] / 4000 == pytest.approx(0.3 + 0.7 * 0.1, abs=0.02)
    fast = _answers(labeller, 8000, rng)
    assert sum(left for better, left in fast if better) / 4000 == pytest.approx(0.93, abs=0.04)
    tired = SimulatedLabeller(0.0, fatigue=0.1)
    late = sum(tired.choose([1.0, 0.0], rng, answered=200)["choice"] == "right" for _ in range(4000))
    assert late / 4000 == pytest.approx(0.2, abs=0.02)
    assert SimulatedLabeller(0.0).choose([1.0, 3.0, 2.0], rng) == {"choice": "ranking", "ranking": [1, 2, 0]}
    assert SimulatedLabeller(0.0, other_taste=True).choose([1.0, 3.0, 2.0], rng)["ranking"] == [0, 2, 1]
    assert SimulatedLabeller(0.0, tie_within=0.1).choose([1.0, 1.0], rng) == {"choice": "tie"}


def test_agreement_gives_the_ceiling_of_reward_models(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels(250)
    asker = Asker(store, Rules(overlap=2, repeat_share=0.0, gold_share=0.0))
    rng, labeller = np.random.default_rng(0), SimulatedLabeller(0.1)
    with store.transaction():
        for name in ("anna", "ben"):
            person = store.labeller(name)
            while (showing := asker.next(person)) is not None:
                scores = [-float(index) for index in showing.side]
                asker.answer(person, showing.nonce, str(labeller.choose(scores, rng)["choice"]))
    stats = label_stats(store)
    assert stats.agreement.low < 0.82 < stats.agreement.high  # .9² + .1²
    assert stats.ceiling == pytest.approx(0.9, abs=0.03)
    assert stats.kappa == pytest.approx(stats.alpha.value, abs=0.02)
    assert {one.labels for one in stats.labellers} == {250}


# What to ask next -----------------------------------------------------------------------------------------------------


def test_disagreement_and_margin_by_hand() -> None:
    scores = np.array([[[2.0, 0.0], [1.0, 1.0], [NAN, NAN]], [[-2.0, 0.0], [1.0, 1.0], [NAN, NAN]]])
    p = 1 / (1 + math.exp(-2.0))
    assert disagreement(scores)[:2] == pytest.approx([2 * (p - 0.5) ** 2, 0.0])
    assert margin(scores)[:2] == pytest.approx([0.0, 0.0])
    assert np.isnan(disagreement(scores)[2])
    three = np.array([[[0.0, 1.0, 3.0]]])
    assert margin(three) == pytest.approx([-(1 + 3 + 2) / 3])
    batches = np.array([1, 2, 2])
    assert propensities("newest", batches, None) == pytest.approx([0, 0.5, 0.5])
    assert propensities("disagreement", batches, None) is None
    assert propensities("disagreement", batches, scores) == pytest.approx([1, 0, 0])


@pytest.mark.parametrize("strategy", ["random", "newest", "disagreement", "margin"])
def test_the_stored_propensity_is_the_frequency_of_the_choice(strategy: Any) -> None:
    is_test = np.array([True, False, False, True, False, False, False, False])
    batches = np.array([1, 1, 1, 2, 2, 2, 2, 2])
    scores = np.random.default_rng(1).normal(size=(3, 8, 2))
    rng, draws = np.random.default_rng(0), 3000
    found = [choose(strategy, is_test, batches, scores, rng) for _ in range(draws)]
    counts = Counter(query.index for query in found)
    for query in {query.index: query for query in found}.values():
        assert counts[query.index] / draws == pytest.approx(query.propensity, abs=0.04)
    assert sum(counts[i] for i in (0, 3)) / draws == pytest.approx(0.2, abs=0.03), "held out: always a fifth"
    assert sum(query.strategy == "random" for query in found) / draws >= (0.34 if strategy != "random" else 1)
    assert min(query.propensity for query in found) > 0
    with pytest.raises(ValueError, match=r"random share of 0\.1"):
        choose(strategy, is_test, batches, scores, rng, 0.1)


def test_active_questions_are_those_that_an_ensemble_disagrees_on(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels(100)
    hard = set(range(1, 101, 2))  # so many that the tenth is never larger than what is left of them
    with store.transaction():
        store.set_scores({i: [[3.0, 0.0], [-3.0, 0.0] if i in hard else [3.0, 0.0]] for i in range(1, 101)})
    asker = Asker(store, Rules(strategy="disagreement", repeat_share=0.0, gold_share=0.0, most=12))
    anna, asked = store.labeller("anna"), []
    while (showing := asker.next(anna)) is not None:
        asker.answer(anna, showing.nonce, "left")
        asked.append(showing.item.id)
    assert len(asked) == 12
    rows = {row["id"]: row for row in store.rows("SELECT * FROM items WHERE asked_at IS NOT NULL")}
    active = [i for i in asked if rows[i]["strategy"] == "disagreement"]
    assert active
    assert set(active) <= hard, "the tenth on which the members disagree most"
    assert all(0 < rows[i]["propensity"] <= 1 for i in asked)
