"""Kills the runner of cells at random moments: the same rows at the end as without."""

import random
from pathlib import Path

import pytest
from test_experiments_runner import cell, kill_parents, outcome, parents, rows_in, run_all

from agents.experiments import read_results

__all__ = ["parents"]
pytestmark = [pytest.mark.stress, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.full)])
def test_kill_9_at_random_moments(tmp_path: Path, parents: object, kills: int) -> None:
    rng = random.Random(0)
    cells = [cell(i, seconds=rng.uniform(0, 0.3)) for i in range(40)]
    (tmp_path / "unhurt").mkdir()
    (tmp_path / "killed").mkdir()
    run_all(tmp_path / "unhurt", cells)
    kill_parents(tmp_path / "killed", parents, [rng.choice([0, 1, 1, 2]) for _ in range(kills)], rng, cells)
    assert outcome(read_results(tmp_path / "killed")) == outcome(read_results(tmp_path / "unhurt"))
    assert rows_in(tmp_path / "killed") == len(cells)
