"""The defaults against their neighbours: what the recorded runs say, and how they are compared."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from agents.benchmark.suites import TEXT_V1, TUNING_V1
from agents.pipeline import load_algorithm as catalog
from benchmarks import tuning
from benchmarks.tuning import FIRST, SEEDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tuning.md"


@pytest.fixture(scope="module")
def lines() -> dict[str, dict[str, Any]]:
    return tuning.read()


def test_what_is_better_than_a_default_is_a_preset(lines: dict[str, dict[str, Any]]) -> None:
    """Fails if a default changes without its runs: then run `python -m benchmarks.tuning`."""
    better = {c.algorithm: c.setting for c in tuning.compare(lines) if c.is_better}
    presets = {name: catalog.preset(catalog.find(name), name, "tuned") for name in tuning.ALTERNATIVES}
    assert better == {name: f"rows={preset['rows']}" for name, preset in presets.items() if preset}
    for name, preset in presets.items():
        if preset:  # as many tokens as with the defaults
            assert preset["rows"] * preset["updates"] == 64 * catalog.find(name).Config().updates


def test_the_page_shows_the_recorded_runs(lines: dict[str, dict[str, Any]]) -> None:
    assert tuning.table(lines) in PAGE.read_text(encoding="utf-8")


def test_it_was_tuned_on_other_tasks() -> None:
    assert not {row.id for row in TUNING_V1.rows} & {row.id for row in TEXT_V1.rows}


def test_a_changed_default_is_told(lines: dict[str, dict[str, Any]]) -> None:
    changed = deepcopy(lines)
    changed["rloo"]["settings"]["group"] = 5
    with pytest.raises(ValueError, match=r"rloo had another group: run `python -m benchmarks\.tuning`"):
        tuning.compare(changed, ["rloo"])
    del changed["rloo"]
    with pytest.raises(ValueError, match="rloo has no results for this suite"):
        tuning.compare(changed, ["rloo"])


def test_a_finalist_is_judged_by_other_seeds(lines: dict[str, dict[str, Any]]) -> None:
    """The best of the first seed is the finalist, and what the first seed says of it does not count."""
    made = deepcopy(lines)

    def set_scores(spec: str, first: float, later: float) -> None:
        for task, row in enumerate(TUNING_V1.rows):
            noise = {str(i): later + 0.01 * ((task + i * len(spec)) % 3 - 1) for i in SEEDS}
            made[spec]["runs"][row.name] = {str(FIRST): first, **noise}

    for spec in tuning.specs(["rloo"]):
        set_scores(spec, 0.1, 0.5)
    assert tuning.compare(made, ["rloo"]) == [], "none was better than the defaults with the first seed"
    set_scores("rloo:group=2", 0.9, 0.5)
    set_scores("rloo:group=8", 0.8, 0.9)
    (luck,) = tuning.compare(made, ["rloo"])
    assert (luck.setting, luck.is_better) == ("group=2", False)
    set_scores("rloo:group=2", 0.9, 0.6)
    (better,) = tuning.compare(made, ["rloo"])
    assert better.is_better
    assert better.difference.value == pytest.approx(0.1, abs=0.01)
    set_scores("rloo:group=2", 0.9, 0.51)
    assert not tuning.compare(made, ["rloo"])[0].is_better, "too little to change a default"
