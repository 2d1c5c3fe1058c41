"""Runs of one's own, compared: grouped by what differs besides the seed, with paired differences of their figures.

Two intervals are possible, and they answer different questions. Over held-out prompts: would these trained policies
differ by as much on other prompts? Two runs with the same seed are measured on the same prompts, so that the difference
is taken prompt by prompt. Over seeds: would the difference be there if both were trained again? On a single task no
interval over seeds covers what it claims (`agents.experiments.statistics`); a permutation test takes its place.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from agents.experiments.statistics import MIN_SEEDS, Estimate, permutation_p_value, stratified_mean, t_interval
from agents.report.read import RunData, read_run
from agents.report.settings import flatten
from agents.report.values import as_float

FIGURES = ("gold", "score", "kl_nats_per_sequence", "tokens")
"""What is compared, where runs measure it."""
MIN_PROMPTS = 30
"""Minimum number of held-out prompts for an interval over prompts."""
IGNORED = {"seed", "out", "resume", "threads", "track", "limits", "task"}
"""Options that do not make a group: they differ between the runs of one experiment, or decide the section."""
MAX_LABEL = 3
"""Maximum number of options that a label names."""


@dataclass(frozen=True)
class Group:
    """Runs of one task that differ in nothing but their seed.

    Attributes:
        label: what sets it apart from the other groups.
        runs: by seed.
        folders: of the runs, by seed.
    """

    label: str
    runs: Mapping[int, RunData]
    folders: Mapping[int, Path]

    def figure(self, name: str, when: str = "after") -> dict[int, float]:
        """A figure of each run that measured it, by seed."""
        found = {seed: as_float((_figures(run, when).get(name) or {}).get("mean")) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def best(self) -> float | None:
        """The best attainable gold score, if it is known."""
        return next((best for run in self.runs.values() if (best := as_float(run.evaluation.get("best_gold")))), None)


@dataclass(frozen=True)
class Difference:
    """A figure of one group less that of another.

    Attributes:
        by_seed: the difference for each seed that both have.
        over_prompts: the mean over these seeds, with its interval over held-out prompts, or the reason why it has none.
        p_value: of the permutation test over seeds; None with fewer than `MIN_SEEDS` seeds on a side.
    """

    by_seed: Mapping[int, float]
    over_prompts: Estimate | None
    p_value: float | None


def read_groups(arguments: Sequence[str | Path]) -> dict[str, list[Group]]:
    """The runs in folders, by task, in groups of the same options. The first group is that of the first folder.

    Args:
        arguments: folders of runs, or folders that hold such folders, as `lmgym train --seeds` and `lmgym sweep` make.

    Raises:
        ValueError: a folder holds no finished run, or a run is given twice.
    """
    found = [(number, folder, read_run(folder)) for number, a in enumerate(arguments) for folder in _runs_in(Path(a))]
    if not found:
        raise ValueError("no runs to compare: give folders of finished runs, such as runs/a runs/b")
    seen: dict[Path, Path] = {}
    for _, folder, run in found:
        if folder.resolve() in seen:
            raise ValueError(f"{str(folder)!r} is given twice: leave one out")
        seen[folder.resolve()] = folder
        if not run.evaluation.get("after"):
            raise ValueError(
                f"the run in {str(folder)!r} is not finished: it has no evaluation after training. Continue it with "
                f"`lmgym train --resume {folder}`, or leave it out"
            )
    tasks: dict[str, dict[str, list[tuple[Path, RunData]]]] = {}
    for number, folder, run in found:
        kinds = tasks.setdefault(str(run.config.get("task")), {})
        key = json.dumps(options_of(run), sort_keys=True)
        if any(other.config.get("seed") == run.config.get("seed") for _, other in kinds.get(key, [])):
            key += f" {number} {folder.parent}"  # the same command, run again: with other code, or on another machine
        kinds.setdefault(key, []).append((folder, run))
    return {task: _groups(list(kinds.values())) for task, kinds in tasks.items()}


def options_of(run: RunData) -> dict[str, str]:
    """All options that can make a difference, by dotted name."""
    options = run.config.get("options")
    known = options if isinstance(options, dict) else {}
    pairs = flatten({name: value for name, value in known.items() if name not in IGNORED})
    return {name.removeprefix("options."): value for name, value in pairs}


def _runs_in(folder: Path) -> list[Path]:
    """The folders of runs at a path, at most two levels below it."""
    if (folder / "config.json").is_file() or not folder.is_dir():
        return [folder]  # if it is not a run, reading it says so
    found = sorted({path.parent for pattern in ("*/", "*/*/") for path in folder.glob(f"{pattern}config.json")})
    runs = [path for path in found if (path / "metrics.jsonl").is_file()]
    if not runs:
        raise ValueError(f"no runs in {str(folder)!r}: give the folder of a run, or one that holds such folders")
    return sorted(runs, key=_natural)


def _natural(path: Path) -> list[Any]:
    """Sorts seed-2 before seed-10."""
    digits = "".join(c for c in path.name if c.isdigit())
    return [str(path.parent), path.name.rstrip("0123456789"), int(digits or 0)]


def _groups(kinds: Sequence[Sequence[tuple[Path, RunData]]]) -> list[Group]:
    options = [options_of(runs[0][1]) for runs in kinds]
    labels = [_label(own, options) for own in options]
    groups = []
    for label, runs in zip(labels, kinds, strict=True):
        folder = runs[0][0] if len(runs) == 1 else runs[0][0].parent
        named = label if label and labels.count(label) == 1 else f"{label} {folder}".strip()
        by_seed = {_seed(run, path): (path, run) for path, run in runs}
        if len(by_seed) < len(runs):
            raise ValueError(f"{folder}: two runs with the same options and the same seed; give one of them")
        groups.append(
            Group(named, {s: run for s, (_, run) in by_seed.items()}, {s: p for s, (p, _) in by_seed.items()})
        )
    return groups


def _seed(run: RunData, folder: Path) -> int:
    seed = run.config.get("seed")
    if not isinstance(seed, int):
        raise ValueError(f"{folder / 'config.json'}: the seed is {seed!r}, and must be a whole number")
    return seed


def _label(own: Mapping[str, str], options: Sequence[Mapping[str, str]]) -> str:
    """The options in which a group differs from the others; of an algorithm's own, from those of the same one."""
    peers = [other for other in options if other.get("algorithm") == own.get("algorithm")]
    differing = [
        name
        for name in own
        if any(other.get(name) != own[name] for other in (options if all(name in o for o in options) else peers))
    ]
    algorithm = [own["algorithm"]] if "algorithm" in differing else []
    parts = algorithm + [f"{name} {own[name]}" for name in differing if name != "algorithm"]
    return ", ".join(parts[:MAX_LABEL]) + (", …" if len(parts) > MAX_LABEL else "")


def compared_figures(groups: Sequence[Group]) -> list[str]:
    """The figures that all groups have. If they have a gold score, the score that each was paid is left out."""
    shared = [name for name in FIGURES if all(group.figure(name) for group in groups)]
    return [name for name in shared if not (name == "score" and "gold" in shared)]


def difference(one: Group, other: Group, name: str) -> Difference:
    """A figure of one group less that of another, seed by seed, and prompt by prompt."""
    mine, theirs = one.figure(name), other.figure(name)
    shared = sorted(set(mine) & set(theirs))
    enough = min(len(mine), len(theirs)) >= MIN_SEEDS
    return Difference(
        by_seed={seed: mine[seed] - theirs[seed] for seed in shared},
        over_prompts=_over_prompts(one, other, name, shared) if shared else None,
        p_value=permutation_p_value(mine, theirs) if enough else None,
    )


def paired_interval(differences: Sequence[Float[ndarray, "_n"]], confidence: float = 0.95) -> Estimate:
    """The mean over runs of the mean over prompts of a difference, with its t interval over prompts.

    Each pair of runs is a stratum: the runs are given, and only prompts and samples are drawn. With one pair of runs,
    it is the interval of the paired t test (Student 1908).

    Args:
        differences: for each pair of runs the difference on every prompt.
        confidence: coverage of the interval.
    """
    value, variance, degrees = stratified_mean(differences)
    if min(map(len, differences)) < MIN_PROMPTS:
        return Estimate(float(value), note=f"fewer than {MIN_PROMPTS} held-out prompts")
    if not variance > 0:
        return Estimate(float(value), note="the same difference on every prompt")
    low, high = t_interval(value, variance, degrees, confidence)
    return Estimate(float(value), float(low), float(high), float(degrees))


def _over_prompts(one: Group, other: Group, name: str, seeds: Sequence[int]) -> Estimate:
    mean = float(np.mean([one.figure(name)[seed] - other.figure(name)[seed] for seed in seeds]))
    differences = []
    for seed in seeds:
        mine, theirs = (_after(group.runs[seed], name) for group in (one, other))
        if not mine or not theirs:
            return Estimate(mean, note="a run has no scores.jsonl: it was made by an older version")
        if [prompt for prompt, _ in mine] != [prompt for prompt, _ in theirs]:
            return Estimate(mean, note="the runs were measured on different prompts")
        pairs = np.array([(a, b) for (_, a), (_, b) in zip(mine, theirs, strict=True)], dtype=np.float64)
        if not np.isfinite(pairs).all():
            return Estimate(mean, note="a value is not finite")
        differences.append(pairs[:, 0] - pairs[:, 1])
    return paired_interval(differences)


def _after(run: RunData, name: str) -> list[tuple[object, float]]:
    """Prompt and value of every held-out completion after training."""
    rows = [row for row in run.scores if row["when"] == "after" and name in row]
    return [(row.get("prompt"), math.nan if (v := as_float(row[name])) is None else v) for row in rows]


def _figures(run: RunData, when: str) -> Mapping[str, Any]:
    return run.evaluation.get(when) or {}
