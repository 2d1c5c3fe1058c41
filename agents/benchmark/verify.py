"""Reruns a sample of the cells of a results file: are they what the file says?"""

import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.benchmark.agents import find_agent
from agents.benchmark.league import Results
from agents.benchmark.run import FUNCTION
from agents.benchmark.suites import find_suite
from agents.experiments import Cell, Progress, Workers, run_cells, statistics

CONFIDENCE = 0.99
"""Of the interval of the mean difference, where results differ in their last bits."""
MIN_CELLS = 3


@dataclass(frozen=True)
class Rerun:
    """A cell that was run again.

    Attributes:
        cell: which.
        recorded: its normalised score in the file.
        found: its normalised score now; None: it failed.
        same: whether all gold scores and KL of the curve are equal, to the last bit.
    """

    cell: Cell
    recorded: float
    found: float | None
    same: bool


@dataclass(frozen=True)
class Verdict:
    """The result of `verify`.

    Attributes:
        reruns: the cells.
        difference: recorded score less the one found, mean over cells, with its interval.
        confirmed: whether the file can be believed: all cells are the same, or they differ by chance alone.
        reason: in words.
    """

    reruns: Sequence[Rerun]
    difference: statistics.Estimate
    confirmed: bool
    reason: str


def verify(
    paths: Sequence[str],
    cells: int = 5,
    workers: Workers | None = None,
    seed: int | None = None,
    report: Callable[[Progress], object] = lambda progress: None,
) -> Verdict:
    """Runs a sample of the cells again and compares.

    On the same machine with the same versions every number is equal. Elsewhere the last bits differ, training amplifies
    them, and the question is whether the recorded scores are higher than chance explains.

    Args:
        paths: results files.
        cells: how many cells to run again.
        workers: processes that run them.
        seed: chooses the cells; None: others each time.
        report: called after each cell.

    Raises:
        ValueError: a file is malformed, of a suite that is not installed, or of an agent that is not here.
    """
    results = Results.read(paths)
    suite = find_suite(results.suite.name)
    if suite.hash != results.hash:
        raise ValueError(
            f"the results are of {suite.name} with the hash {results.hash}, and the installed one is {suite.hash}: "
            "verify them with the version of lmgym that made them"
        )
    recorded = {row["key"]: row for row in results.rows if row["status"] == "ok"}
    if not recorded:
        raise ValueError("no cell of these results has ended with a score: there is nothing to verify")
    for spec, config in {row["config"]["spec"]: row["config"] for row in recorded.values()}.items():
        if dict(find_agent(spec).config) != config:
            raise ValueError(
                f"the agent {spec!r} here has other settings than in the results: get the file, or the version, that "
                "made them"
            )
    chosen = (random.Random(seed) if seed is not None else random.SystemRandom()).sample(
        sorted(recorded), min(cells, len(recorded))
    )
    planned = [Cell.from_data(recorded[key]) for key in chosen]
    with tempfile.TemporaryDirectory(prefix="lmgym-verify-") as folder:
        rows = run_cells(planned, FUNCTION, folder, workers, report=report)
    reruns = [_compare(results, recorded[cell.key], row, cell) for cell, row in zip(planned, rows, strict=True)]
    return judge(reruns)


def judge(reruns: Sequence[Rerun]) -> Verdict:
    """Whether reruns confirm what was recorded."""
    failed = [rerun for rerun in reruns if rerun.found is None]
    differences = np.array([rerun.recorded - rerun.found for rerun in reruns if rerun.found is not None])
    value = float(differences.mean()) if len(differences) else 0.0
    if failed:
        return Verdict(reruns, statistics.Estimate(value), False, f"{len(failed)} cells failed: {failed[0].cell.name}")
    if all(rerun.same for rerun in reruns):
        return Verdict(reruns, statistics.Estimate(value), True, "every number is the same, to the last bit")
    if len(reruns) < MIN_CELLS:
        reason = (
            f"numbers differ, and {len(reruns)} cells are too few to tell chance from more: take {MIN_CELLS} or more"
        )
        return Verdict(reruns, statistics.Estimate(value), False, reason)
    variance = float(differences.var(ddof=1)) / len(differences)
    low, high = statistics.t_interval(value, variance, len(differences) - 1.0, CONFIDENCE)
    estimate = statistics.Estimate(value, float(low), float(high))
    within = bool(low <= 0 <= high)
    words = "contains 0: chance explains the differences" if within else "does not contain 0"
    return Verdict(reruns, estimate, within, f"the {CONFIDENCE:.0%} interval of the mean difference {words}")


def _compare(results: Results, recorded: Mapping[str, Any], row: Mapping[str, Any], cell: Cell) -> Rerun:
    if row["status"] != "ok":
        return Rerun(cell, results.score(recorded), None, False)
    curves = [[(p["tokens"], p["gold"], p["kl"]) for p in r["result"]["curve"]] for r in (recorded, row)]
    return Rerun(cell, results.score(recorded), results.score(row), curves[0] == curves[1])
