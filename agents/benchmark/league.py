"""From rows of results to the scores of agents, checked: one suite, no row twice, finite numbers."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from agents.benchmark.suite import League, Suite
from agents.experiments import read_results, statistics

FIGURES = ("tokens", "forward", "backward", "cpu_seconds", "gold", "score", "kl", "length", "distinct_2")
"""What each evaluation holds."""
BASELINES = ("reference", "random")
"""Agents that learn nothing: they are shown, and not compared."""
SEPARATE_P, SEPARATE_BY = 0.01, 0.05
"""Two agents are separated on a task by an adjusted p-value below the first and a difference of at least the second."""


@dataclass(frozen=True)
class Standing:
    """An agent's results.

    Attributes:
        agent: its name.
        scores: task -> index of the seed -> normalised score, of the seeds that all tasks have.
        compute: the same in the league of equal compute.
        failed: the rows of those seeds without a result; they count at the reference's level.
        rows: all of its rows.
        missing: what it lacks to as many seeds as any agent has.
    """

    agent: str
    scores: Mapping[str, Mapping[int, float]]
    compute: Mapping[str, Mapping[int, float]]
    failed: Sequence[Mapping[str, Any]]
    rows: Sequence[Mapping[str, Any]]
    missing: Sequence[str]

    @property
    def seeds(self) -> int:
        """Number of seeds that all tasks have."""
        return min(map(len, self.scores.values()), default=0)

    @property
    def config(self) -> Mapping[str, Any]:
        """Its settings."""
        return self.rows[0]["config"]

    @property
    def command(self) -> str:
        """What runs it again."""
        first = self.rows[0]
        return f"lmgym benchmark {first['study']} --agents {first['config']['spec']} --seeds {max(1, self.seeds)}"


@dataclass(frozen=True)
class Difference:
    """Two agents compared.

    Attributes:
        one, other: their names.
        paired: mean over tasks of the score of the one less that of the other, with its interval.
        improvement: probability that a run of the one beats a run of the other.
        p_value: that of the paired difference, adjusted for all pairs; None without an interval.
    """

    one: str
    other: str
    paired: statistics.Estimate
    improvement: statistics.Estimate
    p_value: float | None


class Results:
    """The results of a benchmark.

    Args:
        rows: as `read_results` gives them.
        configs: the settings of agents by name. If an agent has results with several settings, as after a change of its
            file, these count; by default, those with which it ran last.

    Attributes:
        rows: those that count.
        left_out: for each agent the number of its results with other settings.
        hash: of the suite.
        suite: the tasks that have results. They are in the rows, so that a file can be read on its own.

    Raises:
        ValueError: there are no rows, they are of several suites, or a result is malformed.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], configs: Mapping[str, Mapping[str, Any]] | None = None):
        if not rows:
            raise ValueError("there are no results yet: run `lmgym benchmark SUITE` first")
        self.suite, self.hash = _suite_of(rows), str(rows[0]["setting"]["suite"])
        for row in rows:
            _check(row)
        last = {row["agent"]: row["config"] for row in sorted(rows, key=lambda row: row.get("started", ""))}
        counting = last | dict(configs or {})
        self.rows = [row for row in rows if row["config"] == counting[row["agent"]]]
        self.left_out = Counter(row["agent"] for row in rows if row["config"] != counting[row["agent"]])
        agents = dict.fromkeys(row["agent"] for row in self.rows)
        most = 1 + max((row["index"] for row in self.rows), default=0)
        found = [self._standing(agent, most) for agent in agents]
        self.standings = sorted(found, key=lambda s: (not s.seeds, -self.mean(s).value if s.seeds else 0.0, s.agent))

    @classmethod
    def read(
        cls,
        paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        configs: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "Results":
        """Reads files, and the `.jsonl` files of folders; `configs` as the class.

        Raises:
            ValueError: as the class; or a file is missing or damaged, or holds a cell twice.
        """
        return cls(read_results(paths), configs)

    @property
    def is_whole(self) -> bool:
        """Whether every task of the suite has results."""
        return self.suite.hash == self.hash

    @property
    def ranked(self) -> list[Standing]:
        """The agents that are compared, the best first."""
        return [s for s in self.standings if s.seeds and s.agent not in BASELINES]

    def mean(self, standing: Standing, league: League = "tokens") -> statistics.Estimate:
        """An agent's headline."""
        return statistics.suite_mean(standing.scores if league == "tokens" else standing.compute)

    @cached_property
    def differences(self) -> list[Difference]:
        """Every two agents, over the seeds that both have."""
        pairs = list(combinations(self.ranked, 2))
        paired = [statistics.suite_difference(*_common(a.scores, b.scores)) for a, b in pairs]
        adjusted = iter(statistics.holm([d.p_value for d in paired if d.p_value is not None]))
        return [
            Difference(
                a.agent,
                b.agent,
                difference,
                statistics.probability_of_improvement(a.scores, b.scores),
                None if difference.p_value is None else next(adjusted),
            )
            for (a, b), difference in zip(pairs, paired, strict=True)
        ]

    @cached_property
    def separations(self) -> dict[str, list[tuple[str, str, float, float]]]:
        """For each task the pairs of agents that it separates: the better one, the other, difference, adjusted p."""
        pairs = list(combinations(self.ranked, 2))
        found: dict[str, list[tuple[str, str, float, float]]] = {}
        for task in self.suite.tasks:
            scores = [(a.scores[task], b.scores[task]) for a, b in pairs]
            adjusted = statistics.holm([statistics.permutation_p_value(x, y) for x, y in scores])
            found[task] = []
            for (a, b), (x, y), p in zip(pairs, scores, adjusted, strict=True):
                by = _mean(x.values()) - _mean(y.values())
                if p < SEPARATE_P and abs(by) >= SEPARATE_BY:
                    found[task].append((a.agent, b.agent, by, p) if by > 0 else (b.agent, a.agent, -by, p))
        return found

    def _standing(self, agent: str, most: int) -> Standing:
        rows = [row for row in self.rows if row["agent"] == agent]
        by_cell = {(row["task"], row["index"]): row for row in rows}
        seeds = 0
        while all((task, seeds) in by_cell for task in self.suite.tasks):
            seeds += 1
        missing = [f"{t}, seed {i}" for i in range(most) for t in self.suite.tasks if (t, i) not in by_cell]
        used = {key: row for key, row in by_cell.items() if key[1] < seeds}

        def scores(league: League) -> dict[str, dict[int, float]]:
            return {
                row.name: {i: self.score(used[row.name, i], league) for i in range(seeds)} for row in self.suite.rows
            }

        failed = [row for row in used.values() if row["status"] != "ok"]
        return Standing(agent, scores("tokens"), scores("passes"), failed, rows, missing)

    def score(self, row: Mapping[str, Any], league: League = "tokens") -> float:
        """The normalised headline of a row of results; a failed run counts at the reference's level, 0."""
        if row["status"] != "ok":
            return 0.0
        return self.suite.row(row["task"]).headline(row["result"]["curve"], league)


def _suite_of(rows: Sequence[Mapping[str, Any]]) -> Suite:
    """The suite of the rows, its tasks in the order in which they were run."""
    hashes: dict[str, int] = {}
    tasks: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        setting = row["setting"]
        if "suite" not in setting or "row" not in setting or "spec" not in row["config"]:
            raise ValueError(f"the results of {row['study']!r} are no benchmark: their rows have no suite")
        hashes[f"{row['study']} ({setting['suite']})"] = hashes.get(f"{row['study']} ({setting['suite']})", 0) + 1
        tasks.setdefault(row["task"], setting["row"])
    if len(hashes) > 1:
        listed = ", ".join(f"{count} of {name}" for name, count in hashes.items())
        raise ValueError(f"these results are of different suites and cannot be compared: {listed}. Give files of one")
    return Suite.from_data(rows[0]["study"], list(tasks.values()))


def _check(row: Mapping[str, Any]) -> None:
    """Refuses a result that no headline can be taken of. Numbers that are not finite are refused by the parser."""
    if row["status"] != "ok":
        return
    where = f"{row['study']}: {row['agent']} on {row['task']}, seed {row['index']}"
    curve = row["result"].get("curve")
    if not isinstance(curve, list) or not curve:
        raise ValueError(f"{where}: the result has no curve of evaluations; remove the line, and run the cell again")
    for point in curve:
        for name in FIGURES:
            value = point.get(name) if isinstance(point, dict) else None
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(
                    f"{where}: {name} of an evaluation is {value!r}, and must be a finite number; remove the line, and "
                    "run the cell again"
                )


def _common(
    one: Mapping[str, Mapping[int, float]], other: Mapping[str, Mapping[int, float]]
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """The scores of the seeds that both have."""
    parts = [
        {task: {i: s for i, s in scores[task].items() if i in one[task] and i in other[task]} for task in one}
        for scores in (one, other)
    ]
    return parts[0], parts[1]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
