"""Are the defaults of the algorithms good ones? Each is compared with its neighbours, on tasks outside text-v1.

    python -m benchmarks.tuning --jobs 2             # runs what is missing, then writes docs/tuning.md
    python -m benchmarks.tuning --only ppo,grpo      # some algorithms
    python -m benchmarks.tuning --draw               # only writes the page from the results

An alternative changes one default. All alternatives run with one seed. The one with the best mean meets the defaults
again with three other seeds, and only these count: the best of many runs of one seed is partly luck. What defines an
algorithm, such as GRPO's division by the standard deviation, is not tuned: another value is another algorithm.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from agents.benchmark.agents import find_agent, rl_options
from agents.benchmark.run import FUNCTION, cells_of
from agents.benchmark.suites import find_suite
from agents.experiments import Workers, run_cells, statistics
from benchmarks.learning import write_between
from lmgym.io import atomic

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "tuning.jsonl", ROOT / "docs" / "tuning.md"
SUITE, FIRST, SEEDS, FINALISTS = "tuning-v1", 0, (1, 2, 3), 1
"""Also the index of the seed that chooses the finalists of an algorithm, those of the comparison, and their number."""
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
    options = asdict(rl_options(agent.config["rl"]))
    return {key: value for key, value in options.items() if key not in ("lr", "beta")} | agent.config["config"]


def run(specs: Sequence[str], seeds: Sequence[int], folder: str, jobs: int) -> dict[str, dict[str, Any]]:
    """Runs agents on all tasks with some seeds, where they have not run yet; their lines for `RESULTS`.

    Raises:
        ValueError: a run failed.
    """
    suite = find_suite(SUITE)
    cells = cells_of(suite, [find_agent(spec) for spec in specs], max(seeds) + 1)
    cells = [cell for cell in cells if cell.index in seeds]
    lines: dict[str, dict[str, Any]] = {}
    for row in run_cells(cells, FUNCTION, folder, Workers(jobs), console=Console(stderr=True)):
        if row["status"] != "ok":
            raise ValueError(f"{row['agent']} on {row['task']} failed: {row['error']}")
        spec, curve = row["config"]["spec"], row["result"]["curve"]
        new = {"agent": spec, "suite": suite.hash, "settings": effective(spec), "runs": {}, "seconds": 0.0}
        line = lines.setdefault(spec, new | {"revisions": [], "hardware": row["hardware"]})
        line["revisions"] = sorted({*line["revisions"], row["revision"]})
        score = round(suite.row(row["task"]).headline(curve), 4)
        line["runs"].setdefault(row["task"], {})[str(row["index"])] = score
        line["seconds"] = round(line["seconds"] + curve[-1]["cpu_seconds"], 1)
    return lines


def read() -> dict[str, dict[str, Any]]:
    """The line of each agent."""
    if not RESULTS.exists():
        return {}
    return {line["agent"]: line for line in map(json.loads, RESULTS.read_text("utf-8").splitlines())}


def scores(line: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, dict[int, float]]:
    """The normalised scores of an agent: task -> index of the seed -> score.

    Raises:
        ValueError: a seed is missing.
    """
    lacking = [f"{task}, seed {i}" for task, found in line["runs"].items() for i in seeds if str(i) not in found]
    if lacking:
        raise ValueError(f"{line['agent']} lacks {lacking[0]}: run `python -m benchmarks.tuning`")
    return {task: {i: found[str(i)] for i in seeds} for task, found in line["runs"].items()}


def mean(line: Mapping[str, Any], seeds: Sequence[int]) -> float:
    """Mean over tasks and seeds."""
    return statistics.suite_mean(scores(line, seeds)).value


def finalists(name: str, lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The alternatives of an algorithm that were better than its defaults with the first seed, at most `FINALISTS`."""
    found = {change: mean(lines[f"{name}:{change}"], [FIRST]) for change in ALTERNATIVES[name]}
    better = [change for change, value in found.items() if value > mean(lines[name], [FIRST])]
    return sorted(better, key=lambda change: -found[change])[:FINALISTS]


def compare(lines: Mapping[str, Mapping[str, Any]], algorithms: Iterable[str] = ALTERNATIVES) -> list[Comparison]:
    """The finalists of each algorithm against its defaults.

    Raises:
        ValueError: an agent has no results, or had other settings than it has now.
    """
    for spec in specs(algorithms):
        recorded, now = lines.get(spec, {}).get("settings", {}), effective(spec)
        changed = sorted(key for key, value in recorded.items() if key not in now or now[key] != value)
        if not recorded or changed or lines[spec]["suite"] != find_suite(SUITE).hash:
            why = f"had another {', '.join(changed)}" if changed else "has no results for this suite"
            raise ValueError(f"{spec} {why}: run `python -m benchmarks.tuning`")
    return [
        Comparison(
            name,
            change,
            mean(lines[f"{name}:{change}"], SEEDS),
            statistics.suite_difference(scores(lines[f"{name}:{change}"], SEEDS), scores(lines[name], SEEDS)),
        )
        for name in algorithms
        for change in finalists(name, lines)
    ]


def table(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """The page's table."""
    out = [
        "| algorithm | setting | first seed | three other seeds | less the defaults [95 %] | seconds of a run |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    compared = {(c.algorithm, c.setting): c for c in compare(lines)}
    for name in ALTERNATIVES:
        for change in ("", *ALTERNATIVES[name]):
            line = lines[f"{name}:{change}" if change else name]
            seconds = line["seconds"] / sum(map(len, line["runs"].values()))
            cells = [f"`{name}`" if not change else "", f"`{change}`" if change else "defaults"]
            cells += [f"{mean(line, [FIRST]):.3f}"]
            if c := compared.get((name, change)):
                cells += [f"{c.mean:.3f}", f"{c.difference}{' **better**' if c.is_better else ''}"]
            else:
                cells += ["" if change else f"{mean(line, SEEDS):.3f}", ""]
            out.append(f"| {' | '.join([*cells, f'{seconds:.1f}'])} |")
    revisions = ", ".join(sorted({revision for line in lines.values() for revision in line["revisions"]}))
    machines = "; ".join(sorted({line["hardware"] for line in lines.values()}))
    return "\n".join([*out, "", f"`python -m benchmarks.tuning`; revision {revisions}; {machines}."])


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
        for name in options.only.split(","):
            lines |= run(specs([name]), [FIRST], options.out, options.jobs)
            last = [name, *(f"{name}:{change}" for change in finalists(name, lines))]
            lines |= run(last, [FIRST, *SEEDS], options.out, options.jobs)
        ordered = [lines[spec] for spec in specs(ALTERNATIVES) if spec in lines]
        atomic.write(RESULTS, "".join(json.dumps(line) + "\n" for line in ordered))
    write_between(PAGE, "tuning", table(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
