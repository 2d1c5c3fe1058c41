"""What a run was planned to cost beside what it costs: the fit of steps, the file of a plan, and its correction."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from agents.runs.meter import Meter, StageCost
from agents.runs.resume import OPTIONS_THAT_MAY_CHANGE, differences
from agents.training import Stateful
from lmgym.io import parse_json

PLAN_FILE = "plan.json"
PLAN_FORMAT = 1
CORRECTED_AFTER = 0.05
"""Share of the updates after which the time of the whole run is estimated again."""
CLOCKS = ("seconds", "processor_seconds")
"""What is predicted of every stage: time by the clock, and time of the processor."""


@dataclass(frozen=True)
class StepFit:
    """The time of steps: b·steps + c·tokens.

    Attributes:
        b: seconds of a step.
        c: seconds of a token.
        spread: standard deviation of a step's seconds around the fit, by the median of the deviations.
        steps: number of steps that were measured.
    """

    b: float
    c: float
    spread: float
    steps: int

    def seconds(self, steps: float | int, tokens: float | int) -> float:
        """Seconds of so many steps with so many tokens in all."""
        return self.b * steps + self.c * tokens


def fit_steps(seconds: Sequence[float], tokens: Sequence[float]) -> StepFit:
    """Fits b and c, neither below 0, with the least sum of absolute deviations.

    Like the median, which it is without tokens, it ignores a few steps that take longer: the first one, those with an
    evaluation, and those during which another process had the processor.

    Args:
        seconds: of each step.
        tokens: of each step; all 0 where they are not known.

    Raises:
        ValueError: there are no steps.
    """
    if not seconds or len(seconds) != len(tokens):
        raise ValueError(f"{len(seconds)} seconds and {len(tokens)} numbers of tokens: at least one step is needed")
    from scipy.optimize import linprog  # here, because every training run imports this module, and few have a plan

    times, counts = np.asarray(seconds, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    n, unit, size = len(times), max(times.max(), 1e-12), max(counts.max(), 1e-12)
    # Variables: b, c, and the parts above and below the fit of each step; scaled so that all are near 1.
    costs = np.concatenate([[0.0, 0.0], np.ones(2 * n)])
    columns = np.column_stack([np.ones(n), counts / size, np.eye(n), -np.eye(n)])
    found = linprog(costs, A_eq=columns, b_eq=times / unit, bounds=(0, None), method="highs").x
    b, c = found[0] * unit, found[1] * unit / size
    spread = 1.4826 * float(np.median(np.abs(times - b - c * counts)))
    return StepFit(float(b), float(c), spread, n)


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope, neither below 0, by least squares (Lawson & Hanson 1974, chapter 23)."""
    from scipy.optimize import nnls  # see above

    a, slope = nnls(np.column_stack([np.ones(len(x)), x]), np.asarray(y, dtype=np.float64))[0]
    return float(a), float(slope)


def read_plan(path: str | Path) -> dict[str, Any]:
    """The contents of a plan's file.

    Raises:
        ValueError: there is no such file, or it is not a plan.
    """
    remedy = "make one with `lmgym plan`, or leave out --plan"
    if not Path(path).is_file():
        raise ValueError(f"there is no plan {str(path)!r}: {remedy}")
    try:
        plan = parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}): {remedy}") from error
    if not isinstance(plan, dict) or "plan_format" not in plan:
        raise ValueError(f"{path} is not the file of a plan: {remedy}")
    if plan["plan_format"] != PLAN_FORMAT:
        raise ValueError(
            f"{path} was written by another version of lmgym (format {plan['plan_format']}, and this one reads "
            f"{PLAN_FORMAT}): {remedy}"
        )
    try:
        for stage in (*plan["stages"].values(), plan["total"]):
            for name in CLOCKS:
                if not all(math.isfinite(stage[name][part]) for part in ("value", "low", "high")):
                    raise ValueError(f"{name} is not finite")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): {remedy}") from error
    return plan


def check_same_setting(
    plan: Mapping[str, Any], path: str, options: Mapping[str, Any], inputs: Mapping[str, str]
) -> None:
    """Refuses the plan of a run with other options or files; its seed may be another.

    Raises:
        ValueError: it names the first differences.
    """
    ignored = (*OPTIONS_THAT_MAY_CHANGE, "seed")
    then, now = ({k: v for k, v in found.items() if k not in ignored} for found in (plan["options"], options))
    found = differences(then, now)
    found += [f"{name} has changed" for name, digest in inputs.items() if plan["inputs"].get(name) != digest]
    if found:
        raise ValueError(
            f"{path} is the plan of another setting ({'; '.join(found[:3])}): plan this one with `lmgym plan`, or "
            "leave out --plan"
        )


@runtime_checkable
class Watched(Protocol):
    """What a `PlanWatch` needs of a run."""

    def say(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def write(self, name: str, data: Any) -> None: ...
    def seconds(self) -> float: ...


class PlanWatch(Meter):
    """Measures a run that has a plan, says when the plan was wrong, and keeps both in plan.json of the run's folder.

    Args:
        plan: from `read_plan`; of a run that continues, with what it has measured.
        algorithm: name of the stage that is corrected after its first updates.
        run: the run.
        device, base_mb: as in `Meter`.
    """

    def __init__(
        self, plan: Mapping[str, Any], algorithm: str, run: Watched, device: torch.device, base_mb: float | None
    ):
        super().__init__(device, base_mb, run.seconds)
        self.plan, self.algorithm, self.run = plan, algorithm, run
        self.stages.update({name: StageCost.of(stage) for name, stage in plan.get("actual", {}).items()})
        self.corrected: float | None = plan.get("corrected_seconds")
        done = sum(stage.seconds for stage in self.stages.values())
        self._began = (done, self._began[1])
        run.write(PLAN_FILE, self.contents())

    def step(self, loop: str, done: int, total: int | None, metrics: Mapping[str, float]) -> None:
        """As in `Meter`; after the first updates of the algorithm, the plan is corrected."""
        super().step(loop, done, total, metrics)
        if loop == self.algorithm and total and done == max(3, math.ceil(CORRECTED_AFTER * total)):
            self._correct(done, total)

    def leave(self, stateful: Mapping[str, Stateful]) -> None:
        """Nothing: a real run has real checkpoints."""

    def _correct(self, done: int, total: int) -> None:
        """Estimates the algorithm's stage again, from its first updates."""
        planned = self.plan["stages"].get(self.algorithm)
        measured = self._loops[self.algorithm]
        if planned is None or len(measured.seconds) < 2:
            return
        fit = fit_steps(measured.seconds[1:], measured.tokens[1:])
        mean = sum(measured.tokens[1:]) / len(measured.tokens[1:])
        left = fit.seconds(total - done, (total - done) * mean)
        self.corrected = self.clock() - self._began[0] + left
        what = (
            f"{self.algorithm} will take {words(self.corrected)}, and {band_in_words(planned['seconds'])} was planned"
        )
        if planned["seconds"]["low"] <= self.corrected <= planned["seconds"]["high"]:
            self.run.say(f"plan: after {done} of {total} updates, {what}")
        else:
            to_come = self.plan["stages"].keys() - self.stages.keys() - {self.algorithm}
            after = sum(self.plan["stages"][name]["seconds"]["value"] for name in to_come)
            all_in_all = self._began[0] + self.corrected + after
            self.run.warn(
                f"the plan was wrong: after {done} of {total} updates, {what}; the whole run will take about "
                f"{words(all_in_all)}"
            )

    def end(self, stage: str) -> None:
        """As in `Meter`; says if the stage needed more memory than planned."""
        super().end(stage)
        self.run.write(PLAN_FILE, self.contents())
        planned, found = self.plan["stages"].get(stage, {}).get("peak_mb"), self.stages[stage].peak_mb
        if planned and found is not None and found > planned["high"]:
            self.run.warn(
                f"the plan was wrong: {stage} needed {found:,.0f} MB of memory, and {planned['value']:,.0f} MB (at "
                f"most {planned['high']:,.0f}) were planned"
            )

    def contents(self) -> dict[str, Any]:
        """The plan with what was measured until now."""
        actual = {name: stage.as_data() | {"loops": {}} for name, stage in self.stages.items()}
        return {**self.plan, "actual": actual, "corrected_seconds": self.corrected}


def words(seconds: float | int) -> str:
    """A time in words: "0.4 s", "40 s", "12 min", "3.5 h"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def band_in_words(band: Mapping[str, float]) -> str:
    """A predicted time and its band, such as "40 s (34 s to 46 s)"."""
    return f"{words(band['value'])} ({words(band['low'])} to {words(band['high'])})"
