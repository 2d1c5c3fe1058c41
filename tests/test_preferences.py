"""Comparisons and simulated annotators, against closed forms."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lmgym import Completion, Prompt
from lmgym.preferences import Comparison, SimulatedAnnotator, collect_comparisons, read_comparisons, write_comparisons
from lmgym.tasks.probe import Bandit


def test_files_come_back(tmp_path: Path) -> None:
    pairs = [Comparison("p\n", ("better", "worse é")), Comparison("q", ("1", "2", "3"))]
    write_comparisons(tmp_path / "pairs.jsonl", pairs)
    assert read_comparisons(tmp_path / "pairs.jsonl") == pairs
    first = json.loads((tmp_path / "pairs.jsonl").read_text().splitlines()[0])
    assert first == {"prompt": "p\n", "chosen": "better", "rejected": "worse é"}
    assert [pair.pairs for pair in pairs] == [1, 3]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": "b"},
        {"prompt": 1, "chosen": "a", "rejected": "b"},
        {"prompt": "a", "ranking": ["b"]},
        {"prompt": "a", "ranking": ["b", 2]},
        {"prompt": "a", "ranking": "bc"},
    ],
)
def test_malformed_rows_name_their_line(tmp_path: Path, row: dict[str, object]) -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "x.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2: a comparison needs"):
        read_comparisons(tmp_path / "x.jsonl")


def test_real_preferences_read(shared_data: Path) -> None:
    assert len(read_comparisons(shared_data / "hh_tiny_train.jsonl")) == 1079


def test_two_default_annotators_agree_as_often_as_people_did() -> None:
    """Stiennon et al. (2020): 72 % between two, 77 % of a majority of three with one that is right."""
    right = SimulatedAnnotator().prefers(100.0, 0.0)
    assert right == pytest.approx(0.832, abs=1e-9)
    assert right**2 + (1 - right) ** 2 == pytest.approx(0.72, abs=0.005)
    annotator, rng = SimulatedAnnotator(), np.random.default_rng(0)
    first, second = (np.array([annotator.rank([0.0, 1.0], rng)[0] for _ in range(4000)]) for _ in range(2))
    assert float((first == second).mean()) == pytest.approx(0.72, abs=0.03)


def test_preferences_follow_bradley_terry() -> None:
    annotator = SimulatedAnnotator(error_rate=0.1, scale=2.0)
    for first, second in ((0.0, 0.0), (1.0, 0.0), (0.0, 0.7)):
        expected = 0.1 + 0.8 / (1 + math.exp(-2.0 * (first - second)))
        assert annotator.prefers(first, second) == pytest.approx(expected)
        rng = np.random.default_rng(0)
        wins = sum(annotator.rank([first, second], rng)[0] == 0 for _ in range(8000))
        assert wins / 8000 == pytest.approx(expected, abs=0.02)


def test_an_annotator_without_error_sorts() -> None:
    sure, rng = SimulatedAnnotator(error_rate=0.0, scale=1e6), np.random.default_rng(0)
    for _ in range(20):
        golds = rng.permutation(7).astype(float).tolist()
        assert [golds[i] for i in sure.rank(golds, rng)] == sorted(golds, reverse=True)
    with pytest.raises(ValueError, match=r"error_rate=0\.5"):
        SimulatedAnnotator(error_rate=0.5)


def test_ties_are_broken_evenly() -> None:
    annotator, rng = SimulatedAnnotator(), np.random.default_rng(0)
    counts = Counter(annotator.rank([0.5, 0.5], rng)[0] for _ in range(4000))
    assert counts[0] / 4000 == pytest.approx(0.5, abs=0.03)


def test_what_is_asked_and_what_is_not() -> None:
    sure, rng = SimulatedAnnotator(error_rate=0.0, scale=1e6), np.random.default_rng(0)
    prompts = [Prompt("a"), Prompt("b"), Prompt("c")]
    groups = [
        [Completion("b"), Completion("d"), Completion("b"), Completion("c", "length")],
        [Completion("d"), Completion("d")],
        [Completion("zz"), Completion("yy"), Completion("a")],
    ]
    asked = collect_comparisons(Bandit(), prompts, groups, sure, rng)
    assert asked[0] == Comparison("a", ("d", "b"))
    assert [c.prompt for c in asked] == ["a", "c"]
    # zz, yy and a all score 0.
    assert [c.prompt for c in collect_comparisons(Bandit(), prompts, groups, sure, rng, skip_ties=True)] == ["a"]
