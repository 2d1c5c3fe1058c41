"""Labels by people: nothing is lost, figures are right, files come back exactly, choices have their propensities."""

import json
import math
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from lmgym.preferences import (
    Asker,
    Comparison,
    Item,
    LabelStore,
    Rules,
    SimulatedLabeller,
    StoreError,
    cohen_kappa,
    comparisons_of,
    error_rate,
    export_labels,
    import_labels,
    krippendorff_alpha,
    label_card,
    label_stats,
    read_comparisons,
    read_items,
    side_bias,
    wilson,
    write_comparisons,
)
from lmgym.preferences.agreement import alpha_with_interval
from lmgym.preferences.database import disk_kind
from lmgym.preferences.queries import choose, closeness, disagreement, propensities

PLAIN = Rules(repeat_share=0.0, gold_share=0.0)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., LabelStore]:
    """Makes a store with some questions."""

    def made(count: int = 6, name: str = "labels.db", texts: int = 2) -> LabelStore:
        store = LabelStore(tmp_path / name, create=True, clock=clock)
        store.add_items([Item(f"prompt {i}", tuple(f"text {i}.{k}" for k in range(texts))) for i in range(count)])
        return store

    return made


# What is asked, and what becomes of answers ---------------------------------------------------------------------------


def test_an_answer_is_in_the_coordinates_of_the_item_whatever_the_side(make: Callable[..., LabelStore]) -> None:
    store = make(40)
    asker, anna = Asker(store, PLAIN), store.labeller("anna")
    sides = []
    while (showing := asker.next(anna)) is not None:
        left = showing.item.texts[showing.side[0]]
        outcome = asker.answer(anna, showing.nonce, "left" if left.endswith(".0") else "right", client_ms=2.0)
        assert outcome.answer == "a"
        sides.append(showing.side)
    assert Counter(label.answer for label in store.labels()) == {"a": 40}
    assert all(label.ranking == (0, 1) and label.client_ms == 2.0 for label in store.labels())
    assert binomtest(sum(side == (0, 1) for side in sides), 40).pvalue > 0.001
    assert len({(c.prompt, c.ranked) for c in comparisons_of(store)}) == 40


def test_sides_follow_from_the_file_s_key_and_not_from_the_item(make: Callable[..., LabelStore]) -> None:
    """Nobody can predict the sides: two files draw them independently, two labellers of a file too."""
    drawn = []
    for name in ("one.db", "two.db"):
        store = make(200, name)
        asker = Asker(store, Rules(repeat_share=0.0, gold_share=0.0, overlap=2))
        for person in ("anna", "ben"):
            found, labeller = {}, store.labeller(person)
            with store.transaction():
                while (showing := asker.next(labeller)) is not None:
                    found[showing.item.id] = showing.side
                    asker.answer(labeller, showing.nonce, "tie")
            drawn.append([found[item] == (0, 1) for item in sorted(found)])
    for i in range(4):
        for j in range(i):
            assert 60 < sum(a == b for a, b in zip(drawn[i], drawn[j], strict=True)) < 140


def test_a_second_answer_with_the_same_nonce_changes_nothing(make: Callable[..., LabelStore]) -> None:
    store = make()
    asker, anna = Asker(store, PLAIN), store.labeller("anna")
    showing = asker.next(anna)
    assert showing is not None
    first = asker.answer(anna, showing.nonce, "tie")
    second = asker.answer(anna, showing.nonce, "neither")
    assert (first.is_new, second.is_new, second.answer, second.event) == (True, False, "tie", first.event)
    assert [label.answer for label in store.labels()] == ["tie"]
    with pytest.raises(ValueError, match="not shown to you"):
        asker.answer(store.labeller("ben"), showing.nonce, "tie")


def test_two_tabs_show_the_same_question_and_two_people_never_do(make: Callable[..., LabelStore], clock: Clock) -> None:
    store = make(3)
    asker = Asker(store, PLAIN)
    anna, ben, cem, dia = (store.labeller(name) for name in ("anna", "ben", "cem", "dia"))
    shown = [asker.next(person) for person in (anna, anna, ben, cem, dia)]
    assert shown[0] == shown[1]
    assert len({s.item.id for s in shown[1:4] if s}) == 3
    assert shown[4] is None, "all three are reserved"
    clock.now += 121
    late = asker.next(dia)
    assert late is not None
    assert shown[0] is not None
    taken = next(s for s in shown[1:4] if s is not None and s.item.id == late.item.id)
    who = (anna, ben, cem)[shown[1:4].index(taken)]
    # Whose lease expired may still answer: nothing that a person did is thrown away.
    assert asker.answer(who, taken.nonce, "left").is_new
    assert asker.answer(dia, late.nonce, "right").is_new
    assert len(store.labels()) == 2


def test_a_clock_that_is_set_back_frees_what_was_reserved(make: Callable[..., LabelStore], clock: Clock) -> None:
    store = make(1)
    asker, anna, ben = Asker(store, PLAIN), store.labeller("anna"), store.labeller("ben")
    assert asker.next(anna) is not None
    clock.now -= 86400
    showing = asker.next(ben)
    assert showing is not None
    asker.answer(ben, showing.nonce, "left")
    assert asker.latest(ben) == store.labels()[0].id


def test_overlap_asks_several_people_and_a_skip_is_no_label(make: Callable[..., LabelStore]) -> None:
    store = make(4)
    asker = Asker(store, Rules(overlap=2, repeat_share=0.0, gold_share=0.0))
    people = [store.labeller(name) for name in ("anna", "ben", "cem")]
    for index, person in enumerate(people):
        while (showing := asker.next(person)) is not None:
            asker.answer(person, showing.nonce, "skip" if index == 0 and showing.item.id == 1 else "left")
    counts = Counter(label.item for label in store.labels() if label.answer != "skip")
    assert counts == {1: 2, 2: 2, 3: 2, 4: 2}
    assert asker.progress(people[0]) == {"mine": 4, "all": 8, "wanted": 8}


def test_undo_is_an_event_and_the_question_comes_back(make: Callable[..., LabelStore]) -> None:
    store = make()
    asker, anna = Asker(store, PLAIN), store.labeller("anna")
    showing = asker.next(anna)
    assert showing is not None
    event = asker.answer(anna, showing.nonce, "left").event
    assert asker.undo(anna, event)
    assert not asker.undo(anna, event), "a second undo of the same answer does nothing"
    again = asker.next(anna)
    assert again is not None
    assert (again.item.id, again.side) == (showing.item.id, showing.side)
    assert again.nonce != showing.nonce
    assert store.labels() == []
    asker.answer(anna, again.nonce, "right")
    assert [row["answer"] for row in store.rows("SELECT answer FROM events ORDER BY id")][1] == "undo"
    assert len(store.labels()) == 1
    with pytest.raises(ValueError, match="no such answer of yours"):
        asker.undo(store.labeller("ben"), store.labels()[0].id)


def test_events_cannot_be_changed_or_deleted(make: Callable[..., LabelStore]) -> None:
    store = make()
    asker, anna = Asker(store, PLAIN), store.labeller("anna")
    showing = asker.next(anna)
    assert showing is not None
    asker.answer(anna, showing.nonce, "left")
    for statement in ("UPDATE events SET answer = 'b'", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store.connection.execute(statement)
    assert len(store.labels()) == 1


def test_repeats_come_later_with_the_sides_reversed_and_are_not_trained_on(make: Callable[..., LabelStore]) -> None:
    store = make(60)
    asker, anna = Asker(store, Rules(repeat_share=0.2, gold_share=0.0)), store.labeller("anna")
    sides: dict[int, Any] = {}
    repeated = 0
    while (showing := asker.next(anna)) is not None:
        if showing.repeat:
            repeated += 1
            assert sides[showing.item.id] == showing.side[::-1]
            assert list(sides)[-10:].count(showing.item.id) == 0, "not one of the last ten"
        sides.setdefault(showing.item.id, showing.side)
        asker.answer(anna, showing.nonce, "left")  # by the side alone: never the same answer twice
    stats = label_stats(store)
    assert 5 <= repeated == stats.consistency.count
    assert stats.consistency.value == 0
    assert stats.bias.value == 1
    assert stats.side_alarm
    assert len(comparisons_of(store)) == 60


def test_calibration_comes_first_and_gold_is_hidden(make: Callable[..., LabelStore]) -> None:
    store = make(40)
    store.add_items([Item(f"practice {i}", ("yes", "no"), purpose="calibration", best=0) for i in range(4)])
    store.add_items([Item(f"known {i}", ("no", "yes"), purpose="gold", best=1) for i in range(5)])
    asker, anna = Asker(store, Rules(repeat_share=0.0, gold_share=0.2, calibration=3)), store.labeller("anna")
    purposes, told = [], []
    while (showing := asker.next(anna)) is not None:
        best = showing.item.best or 0
        outcome = asker.answer(anna, showing.nonce, "left" if showing.side[0] == best else "right")
        purposes.append(showing.item.purpose)
        told.append(outcome.right)
    assert purposes[:3] == ["calibration"] * 3
    assert told[:3] == [True] * 3
    assert set(told[3:]) == {None}, "a hidden item tells nothing"
    assert 2 <= purposes.count("gold") <= 5
    stats = label_stats(store)
    assert (stats.gold.value, stats.gold.count, stats.error.value) == (1.0, purposes.count("gold"), 0.0)
    assert len(comparisons_of(store)) == 40, "neither trains a model"


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["ask", "answer", "undo", "late", "back", "open"]))))
def test_any_order_of_events_keeps_one_label_for_each_person_and_item(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]]
) -> None:
    clock = Clock()
    path = tmp_path_factory.mktemp("store") / "labels.db"
    store = LabelStore(path, create=True, clock=clock)
    store.add_items([Item(f"prompt {i}", ("a", "b")) for i in range(5)])
    rules = Rules(overlap=2, repeat_share=0.3, gold_share=0.0)
    people = [store.labeller(name) for name in ("anna", "ben", "cem")]
    open_nonces: dict[int, list[str]] = {person: [] for person in people}
    kept: set[int] = set()
    for who, step in steps:
        asker, person = Asker(store, rules), people[who]
        if step == "ask" and (showing := asker.next(person)) is not None:
            open_nonces[person].append(showing.nonce)
        elif step == "answer" and open_nonces[person]:
            try:
                outcome = asker.answer(person, open_nonces[person][-1], "left")
            except ValueError:  # an undo has withdrawn the question
                open_nonces[person].pop()
            else:
                kept |= {outcome.event} if outcome.is_new else set()
        elif step == "undo" and (event := asker.latest(person)) is not None:
            asker.undo(person, event)
            kept.discard(event)
        elif step in ("late", "back"):
            clock.now += 500 if step == "late" else -500
        elif step == "open":
            store.close()
            store = LabelStore(path, clock=clock)
    labels = store.labels()
    assert {label.id for label in labels} == kept
    assert len({(label.item, label.labeller, label.repeat) for label in labels}) == len(labels)
    counts = Counter(label.item for label in labels if not label.repeat)
    assert {row["id"]: row["labels"] for row in store.rows("SELECT id, labels FROM items")} == {
        i: counts[i] for i in range(1, 6)
    }
    store.close()


def test_withdrawn_answers_are_gone_from_the_file(make: Callable[..., LabelStore]) -> None:
    store = make(8)
    asker = Asker(store, Rules(overlap=2, repeat_share=0.0, gold_share=0.0))
    store.add_items([Item("write", purpose="write")])
    for name in ("anna", "ben"):
        person = store.labeller(name)
        while (showing := asker.next(person)) is not None:
            is_text = showing.item.purpose == "write"
            asker.answer(
                person, showing.nonce, "text" if is_text else "left", text="a secret of mine" if is_text else ""
            )
    wrote = next(label.labeller for label in store.labels() if label.text)
    assert store.withdraw(wrote) >= 8
    assert {label.labeller for label in store.labels()} == {"anna", "ben"} - {wrote}
    assert store.rows("SELECT COUNT(*) AS n FROM items WHERE labels = 1")[0]["n"] == 8
    store.close()
    for file in store.path.parent.iterdir():
        data = file.read_bytes()
        assert b"a secret of mine" not in data
        assert wrote.encode() not in data, "the pseudonym is gone too"
    with LabelStore(store.path) as again:
        assert again.rows("SELECT events FROM withdrawals")[0]["events"] >= 8
        with pytest.raises(ValueError, match=f"no labeller '{wrote}'; there are"):
            again.withdraw(wrote)


# Files that cannot be used --------------------------------------------------------------------------------------------


def test_unusable_files_get_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no such file of labels"):
        LabelStore(tmp_path / "none.db")
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(StoreError, match=r"text\.db: not a SQLite file"):
        LabelStore(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE x (y)")
    with pytest.raises(StoreError, match="a database of something else"):
        LabelStore(tmp_path / "other.db")
    with pytest.raises(StoreError, match="its folder does not exist"):
        LabelStore(tmp_path / "no folder" / "x.db", create=True)


def test_a_network_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path} nfs4 rw 0 0\n"
    assert disk_kind(tmp_path / "labels.db", mounts) == "nfs4"
    assert disk_kind(Path("/etc/labels.db"), mounts) == "ext4"
    monkeypatch.setattr("lmgym.preferences.database.disk_kind", lambda path: "nfs4")
    with pytest.raises(StoreError, match=r"network disk \(nfs4\)"):
        LabelStore(tmp_path / "labels.db", create=True)
    assert not (tmp_path / "labels.db").exists()


def test_a_full_disk_loses_nothing_that_was_acknowledged(make: Callable[..., LabelStore]) -> None:
    store = make(200)
    asker, anna = Asker(store, PLAIN), store.labeller("anna")
    pages = store.connection.execute("PRAGMA page_count").fetchone()[0]
    store.connection.execute(f"PRAGMA max_page_count = {pages + 3}")
    acknowledged = []

    def label() -> None:
        while (showing := asker.next(anna)) is not None:
            acknowledged.append(asker.answer(anna, showing.nonce, "left").event)

    with pytest.raises(StoreError, match="the disk is full: free some space"):
        label()
    assert 0 < len(acknowledged) < 200
    assert [label.id for label in store.labels()] == acknowledged
    store.connection.execute("PRAGMA max_page_count = 100000")
    with store.transaction():
        while (showing := asker.next(anna)) is not None:
            asker.answer(anna, showing.nonce, "left")
    assert len(store.labels()) == 200


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"texts": ("only one",)}, "give 2 to 4 texts"),
        ({"texts": ("a", "b", "c", "d", "e")}, "5 texts"),
        ({"texts": ("a", " \n")}, "a text is empty"),
        ({"texts": ("a", "a")}, "two texts are the same"),
        ({"texts": ("a", "x" * 1_000_000)}, "1,000,000 characters is too long"),
        ({"texts": ("a", "b"), "purpose": "gold"}, "needs the index of its best text"),
        ({"texts": ("a", "b"), "purpose": "gold", "best": 2}, "not the index"),
        ({"texts": ("a", "b"), "purpose": "write"}, "none to write one"),
    ],
)
def test_questions_that_cannot_be_shown_are_refused(item: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Item("prompt", **item)


def test_a_file_of_pairs_names_the_row_that_cannot_be_shown(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "p", "chosen": "a", "rejected": "b"}]
    for bad, said in (
        ({"prompt": "p", "texts": ["one"]}, "line 2: 1 texts"),
        ({"prompt": "p", "texts": ["a", ""]}, "line 2: a text is empty"),
        ({"prompt": "p", "chosen": "a"}, "line 2: a comparison needs"),
        ({"prompt": "p", "texts": ["a", "y" * 1_000_000]}, "line 2: a text of 1,000,000"),
    ):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
        with pytest.raises(ValueError, match=rf"pairs\.jsonl, {said}"):
            read_items(tmp_path / "pairs.jsonl")
    odd = ["<script>alert(1)</script>", "‮ rtl שלום 👩‍👩‍👧 \x07 \x00"]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "p", "texts": odd}))
    assert read_items(tmp_path / "pairs.jsonl")[0].texts == tuple(odd)


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


def test_agreement_gives_the_ceiling_of_reward_models(make: Callable[..., LabelStore]) -> None:
    store = make(250)
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


def test_disagreement_and_closeness_by_hand() -> None:
    scores = np.array([[[2.0, 0.0], [1.0, 1.0], [NAN, NAN]], [[-2.0, 0.0], [1.0, 1.0], [NAN, NAN]]])
    p = 1 / (1 + math.exp(-2.0))
    assert disagreement(scores)[:2] == pytest.approx([p - 0.5, 0.0])
    assert closeness(scores)[:2] == pytest.approx([0.0, 0.0])
    assert np.isnan(disagreement(scores)[2])
    three = np.array([[[0.0, 1.0, 3.0]]])
    assert closeness(three) == pytest.approx([-(1 + 3 + 2) / 3])
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


def test_active_questions_are_those_that_an_ensemble_disagrees_on(make: Callable[..., LabelStore]) -> None:
    store = make(100)
    hard = set(range(1, 101, 10))
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
    train = {item.id for item in store.items() if item.split == "train"}
    first = [i for i in active if i in hard]
    assert len(first) >= min(len(active), len(hard & train)) - 1
    assert all(0 < rows[i]["propensity"] <= 1 for i in asked)


# Files ----------------------------------------------------------------------------------------------------------------


def filled(store: LabelStore) -> LabelStore:
    """A store with every kind of item and answer."""
    talk = [{"role": "user", "content": "Hello\nthere"}]
    store.add_items([Item("", ("Hi", "Go away"), talk), Item("ranked", ("x", "y", "z"))])
    store.add_items([Item("write one", purpose="write"), Item("known", ("yes", "no"), purpose="gold", best=0)])
    store.set_guidelines("Be kind.\n\nAlways.")
    asker = Asker(store, Rules(overlap=2, repeat_share=0.1, gold_share=0.1))
    choices = ("left", "right", "tie", "neither", "skip")
    for name in ("anna", "ben"):
        person, count = store.labeller(name), 0
        while (showing := asker.next(person)) is not None:
            count += 1
            if showing.item.purpose == "write":
                asker.answer(person, showing.nonce, "text", text="My own\ntext é")
            elif len(showing.side) > 2:
                asker.answer(person, showing.nonce, "ranking", ranking=[2, 0, 1])
            else:
                outcome = asker.answer(person, showing.nonce, choices[count % 5], strength=count % 4 + 1)
                if count == 3:
                    asker.undo(person, outcome.event)
    return store


def test_the_whole_store_comes_back_exactly(make: Callable[..., LabelStore], tmp_path: Path) -> None:
    store = filled(make(20))
    rows = export_labels(store, tmp_path / "a.jsonl", "whole")
    with LabelStore(tmp_path / "copy.db", create=True) as copy:
        assert import_labels(copy, tmp_path / "a.jsonl", "whole") == rows
        export_labels(copy, tmp_path / "b.jsonl", "whole")
        assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
        assert comparisons_of(copy) == comparisons_of(store)
        assert label_stats(copy) == label_stats(store)
        import_labels(copy, tmp_path / "a.jsonl", "whole")
        assert len(copy.labels()) == len(store.labels()), "a second import adds nothing"


@pytest.mark.parametrize(
    ("form", "ties"),
    [("pairs", "drop"), ("pairs", "half"), ("conversations", "half"), ("argilla", "drop"), ("texts", "drop")],
)
def test_exports_come_back_exactly(make: Callable[..., LabelStore], tmp_path: Path, form: Any, ties: Any) -> None:
    store = filled(make(20))
    assert export_labels(store, tmp_path / "a.x", form, ties) > 0
    with LabelStore(tmp_path / "copy.db", create=True) as copy:
        (tmp_path / "a.json").write_bytes((tmp_path / "a.x").read_bytes())
        import_labels(copy, tmp_path / "a.json", form)
        import_labels(copy, tmp_path / "a.json", form)
        export_labels(copy, tmp_path / "b.json", form, ties)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_exported_rows_are_in_the_common_forms(make: Callable[..., LabelStore], tmp_path: Path) -> None:
    store = filled(make(20))
    export_labels(store, tmp_path / "c.jsonl", "conversations")
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert {row["chosen"][0]["role"] for row in rows if "chosen" in row} == {"assistant"}
    assert all(row["prompt"][-1]["role"] == "user" for row in rows)
    export_labels(store, tmp_path / "d.json", "argilla")
    record = json.loads((tmp_path / "d.json").read_text())[0]
    assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
    assert record["responses"]["preference"][0]["value"] in (*record["fields"], "tie", "neither", "skip")
    card = label_card(store, "c.jsonl", "conversations", len(rows))
    assert "> Be kind." in card
    assert "2 labellers under pseudonyms" in card
    assert "Krippendorff's α" in card


def test_ties_are_kept_only_if_they_are_asked_for(tmp_path: Path) -> None:
    tied = [
        Comparison("p", ("a", "b")),
        Comparison("q", ("c", "d"), is_tie=True),
        Comparison("r", ("e", "f", "g"), is_tie=True),
    ]
    write_comparisons(tmp_path / "x.jsonl", tied)
    assert read_comparisons(tmp_path / "x.jsonl", ties="half") == tied
    assert read_comparisons(tmp_path / "x.jsonl", say=lambda message: None) == tied[:1]


def test_the_split_follows_from_the_prompt_alone(make: Callable[..., LabelStore]) -> None:
    one, two = make(300, "one.db"), make(300, "two.db", texts=3)
    splits = [{item.prompt: item.split for item in store.items()} for store in (one, two)]
    assert splits[0] == splits[1]
    share = list(splits[0].values()).count("test") / 300
    assert share == pytest.approx(0.2, abs=0.06)
    assert one.add_items([Item("prompt 3", ("text 3.0", "text 3.1"))]) == [4], "nothing is added twice"
