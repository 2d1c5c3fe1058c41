"""Labels as files: what is exported comes back exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmgym.preferences import (
    Asker,
    Comparison,
    Item,
    LabelStore,
    Rules,
    comparisons_of,
    export_labels,
    import_labels,
    label_card,
    label_stats,
    read_comparisons,
    write_comparisons,
)

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


def test_the_whole_store_comes_back_exactly(make_labels: Callable[..., LabelStore], tmp_path: Path) -> None:
    store = filled(make_labels(20))
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
def test_exports_come_back_exactly(
    make_labels: Callable[..., LabelStore], tmp_path: Path, form: Any, ties: Any
) -> None:
    store = filled(make_labels(20))
    assert export_labels(store, tmp_path / "a.x", form, ties) > 0
    with LabelStore(tmp_path / "copy.db", create=True) as copy:
        (tmp_path / "a.json").write_bytes((tmp_path / "a.x").read_bytes())
        import_labels(copy, tmp_path / "a.json", form)
        import_labels(copy, tmp_path / "a.json", form)
        export_labels(copy, tmp_path / "b.json", form, ties)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_exported_rows_are_in_the_common_forms(make_labels: Callable[..., LabelStore], tmp_path: Path) -> None:
    store = filled(make_labels(20))
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


def test_the_split_follows_from_the_prompt_alone(make_labels: Callable[..., LabelStore]) -> None:
    one, two = make_labels(300, "one.db"), make_labels(300, "two.db", texts=3)
    splits = [{item.prompt: item.split for item in store.items()} for store in (one, two)]
    assert splits[0] == splits[1]
    share = list(splits[0].values()).count("test") / 300
    assert share == pytest.approx(0.2, abs=0.06)
    assert one.add_items([Item("prompt 3", ("text 3.0", "text 3.1"))]) == [4], "nothing is added twice"


def test_a_tie_is_trained_on_with_the_target_one_half() -> None:
    """The loss of a tie is the cross-entropy with target ½: least at equal scores, and the same in both orders."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    from agents.reward_modelling import Config, comparison_loss

    scores = torch.tensor([0.3, 1.7])
    tie, order = Comparison("p", ("a", "b"), is_tie=True), Comparison("p", ("a", "b"))
    half = binary_cross_entropy_with_logits(scores[0] - scores[1], torch.tensor(0.5))
    assert float(comparison_loss(scores, tie, Config())) == pytest.approx(float(half))
    assert float(comparison_loss(scores.flip(0), tie, Config())) == pytest.approx(float(half))
    assert float(comparison_loss(scores, order, Config())) != pytest.approx(
        float(comparison_loss(scores.flip(0), order, Config()))
    )
