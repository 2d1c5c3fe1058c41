"""Several runs of `lmgym train` as cells of an experiment: the seeds of one command, and the settings of a sweep.

Each run has a folder of its own, as if it had been started alone. Its cell is done when the run is finished, so the
same command continues after anything; a run that was interrupted continues from its checkpoint.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from agents.cli.commands import run_command
from agents.cli.folder import arguments_of, input_digests
from agents.cli.options import option_value, without_options
from agents.experiments import Cell, Workers, run_cells
from agents.runs import Stopped, is_finished, read_config
from lmgym.io import parse_json, printable
from lmgym.registry import find_spec

RESERVED = {
    "--resume": "start the same command again to continue",
    "--seed": "leave it out",
    "--procs": "several runs at the same time are --jobs",
}
"""Options of `lmgym train` that make no sense for several runs, and what to do instead."""


def run_seeds(wanted: Any, argv: Sequence[str]) -> int:
    """Runs a command of `lmgym train` once for each seed, and prints and writes what came out.

    Args:
        wanted: its options, with `seeds` and `jobs`.
        argv: its command line.

    Raises:
        ValueError: options contradict one another, or a run failed.
        Stopped: it was interrupted.
    """
    check_options(argv, wanted.seeds, "--seeds")
    line = without_options(argv, {"--seeds": len(wanted.seeds), "--jobs": 1, "--out": 1})
    rows = run_all({"": line}, wanted.seeds, wanted, Path(wanted.out))[""]
    Console().print(_table(rows))
    finish(list(rows.values()), Path(wanted.out))
    return 0


def check_options(argv: Sequence[str], seeds: Sequence[int], option: str) -> None:
    """Refuses options that contradict several runs.

    Raises:
        ValueError: it names the option.
    """
    for name, remedy in RESERVED.items():
        if option_value(argv, name) is not None:
            raise ValueError(f"{name} and {option} cannot be given together: {remedy}")
    wrong = [seed for seed in seeds if seed < 0] or [seed for seed in seeds if seeds.count(seed) > 1]
    if wrong:
        raise ValueError(f"{option}: the seed {wrong[0]} is {'negative' if wrong[0] < 0 else 'given twice'}")


def run_all(
    lines: Mapping[str, Sequence[str]], seeds: Sequence[int], wanted: Any, folder: Path
) -> dict[str, dict[int, dict[str, Any]]]:
    """Runs command lines of `lmgym train`, each with each seed.

    Args:
        lines: the command lines, without seed and folder, by the name of their folder; "" is `folder` itself.
        seeds: the seeds.
        wanted: options that all of them share: task, threads, jobs.
        folder: where their folders are, and results.jsonl.

    Returns:
        For each command line and seed the row of results.jsonl.

    Raises:
        ValueError: there is no such task, or the folder is that of a single run.
        Stopped: it was interrupted.
    """
    find_spec(wanted.task)
    if (folder / "config.json").is_file():
        raise ValueError(f"{str(folder)!r} holds a single run: choose another --out for several")
    inputs = input_digests(wanted)
    cells = {
        (name, seed): Cell(
            study="train", task=wanted.task, agent=name or wanted.algorithm, index=seed,
            config={"arguments": [*line]}, setting={"out": str(folder / name / f"seed-{seed}"), "inputs": inputs},
        )
        for name, line in lines.items()
        for seed in seeds
    }  # fmt: skip
    threads = wanted.threads or max(1, (os.cpu_count() or 1) // max(1, wanted.jobs))
    workers = Workers(wanted.jobs, threads)
    console = Console()
    try:
        rows = run_cells(
            list(cells.values()), "agents.cli.several_runs:train_cell", folder, workers, retry_failed=True,
            console=console,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Stopped(f"stopped; start the same command again to continue the runs in {folder}", 130) from None
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in lines}
    for (name, seed), row in zip(cells, rows, strict=True):
        found[name][seed] = row
    return found


def train_cell(cell: Cell) -> dict[str, Any]:
    """Runs `lmgym train` for a cell; returns what evaluation.json holds. Worker processes call it.

    Raises:
        ValueError: the run stopped early, or its folder holds another run.
    """
    folder = Path(cell.setting["out"])
    argv = [*cell.config["arguments"], f"--seed={cell.index}", f"--out={folder}"]
    if not _is_done(folder, argv):
        status = run_command("train", argv)
        if status:
            raise ValueError(f"the run in {str(folder)!r} stopped early, with status {status}")
    evaluation = parse_json((folder / "evaluation.json").read_text(encoding="utf-8"))
    return {"folder": str(folder), "evaluation": evaluation}


def _is_done(folder: Path, argv: Sequence[str]) -> bool:
    """Whether a folder holds the finished run of a command line: it was killed before its row was written."""
    if not (folder / "config.json").is_file() or not is_finished(folder):
        return False
    made_by, *arguments = arguments_of(str(folder), read_config(folder))
    out = {"--out": 1}
    return made_by == "train" and without_options(arguments, out) == without_options(argv, out)


def result_of(row: Mapping[str, Any], name: str, when: str = "after") -> float | None:
    """A figure of a run's evaluation; None if the run failed or did not measure it."""
    figures = (row["result"] or {}).get("evaluation", {}).get(when, {})
    return figures.get(name, {}).get("mean")


def finish(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Writes the page that compares the runs, and says which failed.

    Raises:
        ValueError: a run failed.
    """
    from agents.experiments.comparison_page import write_comparison  # matplotlib: help must answer without it

    done = [row["result"]["folder"] for row in rows if row["status"] == "ok"]
    if done:
        print(printable(f"comparison: {write_comparison(done, folder / 'compare.html')}"))
    failed = [row for row in rows if row["status"] != "ok"]
    if failed:
        reasons = [f"{Path(row['setting']['out'])}: {_last_line(row['error'])}" for row in failed]
        raise ValueError(
            f"{len(failed)} of {len(rows)} runs failed; the others are finished. Correct the cause and start the same "
            f"command again: it runs only those. {'; '.join(reasons[:3])}. What they printed is in "
            f"{folder / 'results.log'}"
        )


def _last_line(error: str) -> str:
    """The last line of a traceback, without the name of the error's class."""
    line = (error.strip().splitlines() or ["no reason was recorded"])[-1]
    return line.removeprefix("ValueError: ")


def _table(rows: Mapping[int, Mapping[str, Any]]) -> Table:
    """Each figure before training and after it, for every seed."""
    table = Table("after training", *(f"seed {seed}" for seed in rows), "mean", "mean before")
    names = dict.fromkeys(
        name for row in rows.values() for name in (row["result"] or {}).get("evaluation", {}).get("after", {})
    )
    for name in names:
        values = {when: [result_of(row, name, when) for row in rows.values()] for when in ("before", "after")}
        table.add_row(
            Text(name), *map(_shown, values["after"]), *(_shown(_mean(values[w])) for w in ("after", "before"))
        )
    return table


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None if a value is missing: the mean of the runs that did not fail says something else."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
