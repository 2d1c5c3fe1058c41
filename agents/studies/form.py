"""The form of a study: claims, what the seeds gave, and verdicts that are computed from both."""

import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

from agents.experiments.cells import Cell
from agents.experiments.results import Row
from agents.experiments.runner import Progress, Workers, run_cells
from agents.experiments.statistics import Estimate, detectable_effect, mean_of_runs
from agents.studies import STUDIES

Outcome = Literal["held", "did not", "cannot be told"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
MIN_RUNS = 3
"""Minimum number of seeds for a verdict about a mean."""


@dataclass(frozen=True)
class Claim:
    """A statement about one measure, decided before any run: it holds if the measure lies in [low, high].

    Attributes:
        name: of the measure, as `run` returns it.
        text: what the paper says, and what is measured here, in words.
        low, high: the bounds.
        kind: "mean": the interval of the mean over seeds must lie within the bounds. "identity": the value of every
            seed must, because it is true without noise. "count": that of at least `enough` seeds must. "contains": the
            interval of the mean must meet the bounds; this shows no more than that a difference was not found.
        enough: of "count": the share of the seeds that is needed.
    """

    name: str
    text: str
    low: float = -math.inf
    high: float = math.inf
    kind: Literal["mean", "identity", "count", "contains"] = "mean"
    enough: float = 0.8

    @property
    def wanted(self) -> str:
        """The bounds, in words."""
        if self.low == -math.inf:
            bounds = f"at most {self.high:g}"
        else:
            bounds = f"at least {self.low:g}" if self.high == math.inf else f"{self.low:g} to {self.high:g}"
        if self.kind == "count":
            return f"{bounds}, in {self.enough:.0%} of the seeds"
        return bounds + {"identity": ", in every seed", "contains": " is in the interval"}.get(self.kind, "")

    def holds_for(self, value: float) -> bool:
        """Whether one value lies within the bounds."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Panel:
    """One chart of a study's figure: `run` returns its curves by the panel's name.

    Attributes:
        name: key of the curves.
        title, xlabel, ylabel: what the chart shows.
    """

    name: str
    title: str
    xlabel: str
    ylabel: str


@dataclass(frozen=True)
class Verdict:
    """What became of a claim.

    Attributes:
        claim: the claim.
        outcome: whether it held here.
        estimate: the mean over seeds, with its interval.
        values: of each seed.
        detectable: the smallest distance from a bound that so many seeds detect with 80 % power, in the measure's unit;
            None for fewer than two seeds.
    """

    claim: Claim
    outcome: Outcome
    estimate: Estimate
    values: tuple[float, ...]
    detectable: float | None

    def as_data(self) -> dict[str, Any]:
        """The verdict as JSON data."""
        return {
            "claim": self.claim.name, "text": self.claim.text, "wanted": self.claim.wanted, "outcome": self.outcome,
            "value": self.estimate.value, "low": self.estimate.low, "high": self.estimate.high,
            "values": list(self.values), "detectable": self.detectable,
        }  # fmt: skip


def judge(claim: Claim, values: Sequence[float]) -> Verdict:
    """The verdict on a claim, from the values of all seeds.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    estimate = mean_of_runs(values)
    runs, spread = len(values), _deviation(values)
    detectable = detectable_effect(runs) * spread if runs > 1 else None
    inside = [claim.holds_for(value) for value in values]
    if claim.kind == "identity":
        outcome: Outcome = "held" if all(inside) else "did not"
    elif claim.kind == "count":
        outcome = "held" if sum(inside) >= claim.enough * runs else "did not"
    else:
        outcome = _outcome_of_mean(claim, estimate, runs)
    return Verdict(claim, outcome, estimate, tuple(values), detectable)


def _outcome_of_mean(claim: Claim, estimate: Estimate, runs: int) -> Outcome:
    if runs < MIN_RUNS:
        return "cannot be told"
    # Seeds that do not differ leave no doubt about their mean.
    low = estimate.value if estimate.low is None else estimate.low
    high = estimate.value if estimate.high is None else estimate.high
    apart = high < claim.low or low > claim.high
    if apart:
        return "did not"
    if claim.kind == "contains" or (claim.low <= low and high <= claim.high):
        return "held"
    return "cannot be told"


def _deviation(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def measured(study: ModuleType, rows: Sequence[Row]) -> list[Verdict]:
    """The verdict on each claim of a study, from its rows of results.

    Raises:
        ValueError: a seed has no result, or lacks a measure.
    """
    failed = [row for row in rows if row["status"] != "ok"]
    if failed or not rows:
        last = str(failed[0].get("error") or "").strip().splitlines()[-1:] if failed else []
        said = f" ({failed[0]['status']}{''.join(f': {line}' for line in last)})" if failed else ""
        raise ValueError(
            f"{len(failed)} of {len(rows)} seeds have no result{said}. Run them again with --retry-failed, or read the "
            "log beside the results"
        )
    return [judge(claim, [float(row["result"]["measures"][claim.name]) for row in rows]) for claim in study.CLAIMS]


def study_named(name: str) -> ModuleType:
    """The module of a study.

    Raises:
        ValueError: there is no such study.
    """
    if name not in STUDIES:
        raise ValueError(f"no study {name!r}: there are {', '.join(STUDIES)} (`lmgym studies` says what they are)")
    return import_module(f"agents.studies.{name}")


def cells_of(study: ModuleType, config: Any) -> list[Cell]:
    """One cell for each seed. Its key depends on the settings and on the study's own file."""
    name, setting = study.__name__.rpartition(".")[2], {"source": _source_of(study)}
    return [Cell(name, name, "study", index, asdict(config), setting) for index in range(config.seeds)]


def _source_of(study: ModuleType) -> str:
    """The hash of a study's file."""
    return hashlib.sha256(Path(study.__file__ or "").read_bytes()).hexdigest()[:16]


def run_cell(cell: Cell) -> dict[str, Any]:
    """What one seed gave: what the worker processes call.

    Raises:
        ValueError: the study did not return all measures of its claims.
    """
    study = study_named(cell.study)
    found = study.run(study.Config(**cell.config), cell.seed)
    missing = [claim.name for claim in study.CLAIMS if claim.name not in found["measures"]]
    if missing:
        raise ValueError(f"the study {cell.study!r} claims {missing[0]!r}, and did not measure it")
    return found


def run_study(
    name: str,
    config: Any,
    folder: str | os.PathLike[str],
    workers: Workers | None = None,
    retry_failed: bool = False,
    report: Callable[[Progress], object] = lambda progress: None,
) -> list[Row]:
    """Runs those seeds of a study that are not done; returns the rows of all of them.

    Args:
        name: of the study.
        config: its `Config`.
        folder: where the results are.
        workers: the worker processes.
        retry_failed: runs seeds again that ended without a result.
        report: called after each seed.
    """
    cells = cells_of(study_named(name), config)
    return run_cells(cells, "agents.studies.form:run_cell", folder, workers, retry_failed=retry_failed, report=report)


def mean_curves(rows: Sequence[Row], panel: str) -> Mapping[str, Sequence[tuple[float, float]]]:
    """The curves of a panel: points are means over seeds, in their order along the curve.

    Raises:
        ValueError: the seeds' curves differ in their number of points.
    """
    found: dict[str, list[list[list[float]]]] = {}
    for row in rows:
        for label, points in row["result"]["curves"].get(panel, {}).items():
            found.setdefault(label, []).append(points)
    curves = {}
    for label, runs in found.items():
        if len({len(points) for points in runs}) != 1:
            raise ValueError(f"the curves {label!r} of the panel {panel!r} have different numbers of points")
        curves[label] = [
            tuple(math.fsum(point[axis] for point in points) / len(points) for axis in (0, 1))
            for points in zip(*runs, strict=True)
        ]
    return curves
