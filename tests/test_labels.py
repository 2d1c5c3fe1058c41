"""Labels by people: whom to ask what, and that nothing is lost."""

import json
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_stores import PLAIN, Clock
from scipy.stats import binomtest

from lmgym.preferences import (
    Asker,
    Item,
    LabelStore,
    Rules,
    StoreError,
    comparisons_of,
    label_stats,
    read_items,
)
from lmgym.preferences.database import disk_kind

# What is asked, and what becomes of answers ---------------------------------------------------------------------------


def test_an_answer_is_in_the_coordinates_of_the_item_whatever_the_side(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels(40)
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


def test_sides_follow_from_the_file_s_key_and_not_from_the_item(make_labels: Callable[..., LabelStore]) -> None:
    """Nobody can predict the sides: two files draw them independently, two labellers of a file too."""
    drawn = []
    for name in ("one.db", "two.db"):
        store = make_labels(200, name)
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


def test_a_second_answer_with_the_same_nonce_changes_nothing(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels()
    asker, anna = Asker(store, PLAIN), store.labeller("anna")
    showing = asker.next(anna)
    assert showing is not None
    first = asker.answer(anna, showing.nonce, "tie")
    second = asker.answer(anna, showing.nonce, "neither")
    assert (first.is_new, second.is_new, second.answer, second.event) == (True, False, "tie", first.event)
    assert [label.answer for label in store.labels()] == ["tie"]
    with pytest.raises(ValueError, match="not shown to you"):
        asker.answer(store.labeller("ben"), showing.nonce, "tie")


def test_two_tabs_show_the_same_question_and_two_people_never_do(
    make_labels: Callable[..., LabelStore], clock: Clock
) -> None:
    store = make_labels(3)
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


def test_a_clock_that_is_set_back_frees_what_was_reserved(make_labels: Callable[..., LabelStore], clock: Clock) -> None:
    store = make_labels(1)
    asker, anna, ben = Asker(store, PLAIN), store.labeller("anna"), store.labeller("ben")
    assert asker.next(anna) is not None
    clock.now -= 86400
    showing = asker.next(ben)
    assert showing is not None
    asker.answer(ben, showing.nonce, "left")
    assert asker.latest(ben) == store.labels()[0].id


def test_overlap_asks_several_people_and_a_skip_is_no_label(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels(4)
    asker = Asker(store, Rules(overlap=2, repeat_share=0.0, gold_share=0.0))
    people = [store.labeller(name) for name in ("anna", "ben", "cem")]
    for index, person in enumerate(people):
        while (showing := asker.next(person)) is not None:
            asker.answer(person, showing.nonce, "skip" if index == 0 and showing.item.id == 1 else "left")
    counts = Counter(label.item for label in store.labels() if label.answer != "skip")
    assert counts == {1: 2, 2: 2, 3: 2, 4: 2}
    assert asker.progress(people[0]) == {"mine": 4, "all": 8, "wanted": 8}


def test_undo_is_an_event_and_the_question_comes_back(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels()
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


def test_events_cannot_be_changed_or_deleted(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels()
    asker, anna = Asker(store, PLAIN), store.labeller("anna")
    showing = asker.next(anna)
    assert showing is not None
    asker.answer(anna, showing.nonce, "left")
    for statement in ("UPDATE events SET answer = 'b'", "DELETE FROM events"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            store.connection.execute(statement)
    assert len(store.labels()) == 1


def test_repeats_come_later_with_the_sides_reversed_and_are_not_trained_on(
    make_labels: Callable[..., LabelStore],
) -> None:
    store = make_labels(60)
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


def test_calibration_comes_first_and_gold_is_hidden(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels(40)
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


def test_what_is_acknowledged_is_flushed(make_labels: Callable[..., LabelStore]) -> None:
    """A kill cannot show it, only a power failure could: so the settings themselves are tested."""
    store = make_labels()
    assert store.rows("PRAGMA synchronous")[0][0] == 2  # FULL
    assert store.rows("PRAGMA journal_mode")[0][0] == "wal"
    assert oct(store.path.stat().st_mode)[-3:] == "600"


def test_withdrawn_answers_are_gone_from_the_file(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels(8)
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
    for closes in (False, True):  # the journal that an open file has holds nothing either
        if closes:
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


def test_a_full_disk_loses_nothing_that_was_acknowledged(make_labels: Callable[..., LabelStore]) -> None:
    store = make_labels(200)
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
