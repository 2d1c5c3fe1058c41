"""Are the defaults of the algorithms good ones? Each is compared with its neighbours, on tasks outside text-v1.

    python -m benchmarks.tuning --jobs 2             # runs what is missing, then writes docs/tuning.md
    python -m benchmarks.tuning --only ppo,grpo      # some algorithms
    python -m benchmarks.tuning --draw               # only writes the page from the results

An alternative changes one default. What defines an algorithm, such as GRPO's division by the standard deviation, is not
tuned: with another value it would be another algorithm. Results are in benchmarks/tuning.jsonl.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agents.benchmark.agents import FACTOR, find_agent
from agents.benchmark.run import FUNCTION, cells_of
from agents.benchmark.suites import find_suite
from agents.experiments import Workers, run_cells, statistics
from agents.pipeline import RLOptions
from benchmarks.learning import write_between
from lmgym.io import atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "tuning.jsonl", ROOT / "docs" / "tuning.md"
SUITE, SEEDS = "tuning-v1", 3
BETTER_BY = 0.02
"""A default is replaced by an alternative that is better by at least this, if the interval excludes 0."""
COMMON = ("lr_factor=0.5", "lr_factor=2", "rows=32", "rows=128")
ALTERNATIVES: Mapping[str, Sequence[str]] = {
    "rloo": (*COMMON, "group=2", "group=8", "epochs=2", "minibatch_rows=32"),
    "grpo": (*COMMON, "group=4", "group=16", "epochs=2", "clip_high=0.28"),
    "reinforce": (*COMMON, "entropy_coef=0.01"),
    "a2c": (*COMMON, "critic=adapter:critic_lr_factor=4", "value_coef=0.1", "lam=0.95"),
    "expert_iteration": (*COMMON, "group=4", "group=16", "keep=2", "epochs=2"),
    "online_dpo": (*COMMON, "minibatch_pairs=8"),
    "dpo": (*COMMON, "epochs=2", "minibatch_pairs=32"),
    "nlpo": (*COMMON[:2], "epochs=1", "minibatch_rows=32", "critic=adapter:critic_lr_factor=4", "mask_top_p=0.95"),
    "ppo": (
        *COMMON[:2],
        "epochs=1",
        "epochs=4",
        "minibatch_rows=32",
        "critic=head",
        "critic_lr_factor=1",
        "value_coef=0.5",
        "lam=1.0",
    ),
}
"""For each algorithm what is tried; settings joined by a colon are changed together."""


@dataclass(frozen=True)
class Comparison:
    """An alternative against the defaults.

    Attributes:
        algorithm: its name.
        setting: what differs from the defaults.
        mean: mean over the tasks of the normalised score.
        difference: paired, of the alternative less the defaults, with its interval.
    """

    algorithm: str
    setting: str
    mean: float
    difference: statistics.Estimate

    @property
    def is_better(self) -> bool:
        """Whether the alternative should be the default."""
        low = self.difference.low
        return low is not None and low > 0 and self.difference.value >= BETTER_BY


def specs(algorithms: Iterable[str]) -> list[str]:
    """The agents to run: each algorithm with its defaults, and its alternatives."""
    return [spec for name in algorithms for spec in (name, *(f"{name}:{change}" for change in ALTERNATIVES[name]))]


def effective(spec: str) -> dict[str, Any]:
    """All settings that an agent has, but for learning rate and β, which are the row's."""
    agent = find_agent(spec)
    rl = {key: value for key, value in agent.config["rl"].items() if key != FACTOR}
    options = asdict(RLOptions(**rl))
    return {key: value for key, value in options.items() if key not in ("lr", "beta")} | agent.config["config"]


def lines_of(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each agent whose runs are all there, from the rows of its runs.

    Raises:
        ValueError: a run failed.
    """
    suite = find_suite(SUITE)
    by_agent: dict[str, dict[tuple[str, int], Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] != "ok":
            raise ValueError(f"{row['agent']} on {row['task']} failed: {row['error']}")
        by_agent.setdefault(row["config"]["spec"], {})[row["task"], row["index"]] = row
    lines = []
    for spec, found in by_agent.items():
        if len(found) < SEEDS * len(suite.tasks):
            continue
        curves = {cell: row["result"]["curve"] for cell, row in found.items()}
        lines.append(
            {
                "agent": spec,
                "suite": suite.hash,
                "revisions": sorted({row["revision"] for row in found.values()}),
                "hardware": next(iter(found.values()))["hardware"],
                "cpu_seconds": round(sum(curve[-1]["cpu_seconds"] for curve in curves.values()), 1),
                "scores": {
                    t: [round(suite.row(t).headline(curves[t, i]), 4) for i in range(SEEDS)] for t in suite.tasks
                },
                "settings": effective(spec),
            }
        )
    return lines


def read() -> dict[str, dict[str, Any]]:
    """The line of each agent."""
    if not RESULTS.exists():
        return {}
    return {line["agent"]: line for line in map(json.loads, RESULTS.read_text("utf-8").splitlines())}


def compare(lines: Mapping[str, Mapping[str, Any]], algorithms: Iterable[str] = ALTERNATIVES) -> list[Comparison]:
    """Every alternative against the defaults of its algorithm.

    Raises:
        ValueError: an agent has no results, or had other settings than it has now.
    """
    for spec in specs(algorithms):
        recorded = lines.get(spec, {}).get("settings", {})
        now = effective(spec)
        changed = sorted(key for key, value in recorded.items() if key not in now or now[key] != value)
        if not recorded or changed or lines[spec]["suite"] != find_suite(SUITE).hash:
            why = f"had another {', '.join(changed)}" if changed else "has no results for this suite"
            raise ValueError(f"{spec} {why}: run `python -m benchmarks.tuning`")
    scores = {spec: {t: dict(enumerate(s)) for t, s in lines[spec]["scores"].items()} for spec in specs(algorithms)}
    return [
        Comparison(name, change, mean(scores[of]), statistics.suite_difference(scores[of], scores[name]))
        for name in algorithms
        for change in ALTERNATIVES[name]
        for of in (f"{name}:{change}",)
    ]


def mean(scores: Mapping[str, Mapping[int, float]]) -> float:
    """Mean over tasks and seeds."""
    return statistics.suite_mean(scores).value


def table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's table."""
    out = ["| algorithm | setting | mean | difference [95 %] | seconds |", "| --- | --- | --- | --- | --- |"]
    compared = compare(lines)
    for name in ALTERNATIVES:
        default = {t: dict(enumerate(s)) for t, s in lines[name]["scores"].items()}
        out.append(f"| `{name}` | defaults | {mean(default):.3f} | | {lines[name]['cpu_seconds']:.0f} |")
        for c in (c for c in compared if c.algorithm == name):
            seconds = lines[f"{name}:{c.setting}"]["cpu_seconds"]
            better = " **better**" if c.is_better else ""
            out.append(f"| | `{c.setting}` | {c.mean:.3f} | {c.difference}{better} | {seconds:.0f} |")
    return "\n".join(out)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, and writes results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ALTERNATIVES), help="algorithms, with commas")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default=str(ROOT / "runs" / "tuning"), help="folder of the runs")
    parser.add_argument("--draw", action="store_true", help="only write the page")
    options = parser.parse_args(arguments)
    lines = read()
    if not options.draw:
        agents = [find_agent(spec) for spec in specs(options.only.split(","))]
        cells = cells_of(find_suite(SUITE), agents, SEEDS)
        rows = run_cells(cells, FUNCTION, options.out, Workers(options.jobs), console=Console(stderr=True))
        lines |= {line["agent"]: line for line in lines_of(rows)}
        ordered = [lines[spec] for spec in specs(ALTERNATIVES) if spec in lines]
        atomic.write(RESULTS, "".join(json.dumps(line) + "\n" for line in ordered))
    write_between(PAGE, "tuning", table(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
