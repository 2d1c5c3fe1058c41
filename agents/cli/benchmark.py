"""`lmgym benchmark`: agents compared on a suite of tasks, with error bars."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from agents.benchmark.agents import find_agents, known_agents
from agents.benchmark.leaderboard import page
from agents.benchmark.league import Results
from agents.benchmark.run import FUNCTION, cells_of
from agents.benchmark.suites import SUITES, find_suite
from agents.benchmark.table import live_table, markdown
from agents.benchmark.verify import Verdict, verify
from agents.cli.options import note, parse
from agents.experiments import Progress, Shard, Workers, run_cells
from agents.training import require
from lmgym.io import atomic, printable


@dataclass(frozen=True)
class Benchmark:
    """Compare agents on a suite of tasks."""

    suite: tyro.conf.Positional[str] = ""
    """A suite, such as "text-v1"; or "report" to write table and leaderboard of results files again; or "verify" to run
    a sample of their cells again. Without it, suites and agents are listed."""
    files: tyro.conf.Positional[tuple[str, ...]] = ()
    """For "report" and "verify": results files, or folders of them."""
    agents: str = "ppo,grpo,rloo,reinforce,a2c,expert_iteration"
    """What to compare, with commas: algorithms, FILE.py, package.module, installed agents. Settings follow a colon:
    ppo:lr=0.003:epochs=4."""
    seeds: int = 3
    """Seeds of each agent on each task."""
    tasks: str = ""
    """Only these tasks of the suite, with commas."""
    jobs: int = 1
    """Worker processes, of one thread each."""
    shard: str = "1/1"
    """Which part of the cells to run, such as 2/4 on the second of four machines."""
    time_limit: float = 600.0
    """Maximum seconds of a cell, after which it counts as failed; 0: no limit."""
    device: str = "cpu"
    """"cpu" or "cuda". Results of a GPU differ in their last bits, and are cells of their own."""
    retry_failed: bool = False
    """Run cells again that ended without a result."""
    out: str | None = None
    """Folder of results, table.md and leaderboard.html; by default runs/benchmark/SUITE."""
    cells: int = 5
    """For "verify": how many cells to run again."""

    def __post_init__(self) -> None:
        require.in_range(self, "seeds", "jobs", "cells", least=1)
        require.in_range(self, "time_limit", least=0.0)
        if self.files and self.suite not in ("report", "verify"):
            raise ValueError(f"{self.files[0]!r}: a suite takes no files; did you mean `lmgym benchmark report FILE`?")
        if not self.files and self.suite in ("report", "verify"):
            raise ValueError(f"lmgym benchmark {self.suite} needs a results file: give its path, or that of its folder")


def run(argv: Sequence[str]) -> int:
    """Runs, reports or verifies; lists what there is without arguments."""
    options = parse("benchmark", Benchmark, argv)
    match options.suite:
        case "":
            return _list()
        case "report":
            return _write(Results.read(options.files), Path(options.out or "."))
        case "verify":
            return _verify(options)
    return _run(options)


def _list() -> int:
    for suite in SUITES.values():
        print(f"{suite.name}: {len(suite.rows)} tasks, hash {suite.hash}")
        for row in suite.rows:
            print(f"  {row.name:16} {row.capability} ({row.id}, {row.tokens:,} tokens)")
    print(printable(f"agents: {', '.join(known_agents())}"))
    return 0


def _run(options: Benchmark) -> int:
    suite, console = find_suite(options.suite), Console(stderr=True)
    agents, shard = find_agents(_names(options.agents)), Shard.parse(options.shard)
    cells = cells_of(suite, agents, options.seeds, _names(options.tasks), options.device)
    folder = Path(options.out or f"runs/benchmark/{suite.name}")
    configs = {agent.name: agent.config for agent in agents}
    if any(folder.glob("*.jsonl")):
        found = Results.read(str(folder), configs)
        if found.hash != suite.hash:
            raise ValueError(
                f"{str(folder)!r} has results of {found.suite.name} with the hash {found.hash}, and the suite is "
                f"{suite.name}, {suite.hash}: choose another folder with --out"
            )
    workers = Workers(options.jobs, time_limit=options.time_limit)
    with _live(console, lambda: Results.read(str(folder), configs)) as report:
        run_cells(
            cells, FUNCTION, folder, workers, shard=shard, retry_failed=options.retry_failed, report=report,
            console=None if console.is_terminal else console,
        )  # fmt: skip
    return _write(Results.read(str(folder), configs), folder)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


@contextmanager
def _live(console: Console, read: Callable[[], Results]) -> Iterator[Callable[[Progress], None]]:
    """Shows, in a terminal, the table as it fills, with a bar below it; `read` reads the results so far."""
    if not console.is_terminal:
        yield lambda progress: None
        return
    with Live(Text("starting the first cells"), console=console, refresh_per_second=4) as live:

        def show(progress: Progress) -> None:
            bar = ProgressBar(total=progress.total, completed=progress.done, width=40)
            words = Text(f"{progress.done}/{progress.total} cells  {printable(progress.text)}", overflow="ellipsis")
            live.update(Group(as_table(read()), bar, words))

        yield show


def as_table(results: Results) -> Table:
    """The means so far, for a terminal: a line for each task, because there are more tasks than agents."""
    head, rows = live_table(results)
    names = [Column(printable(row[0]), overflow="fold", min_width=5, justify="right") for row in rows]
    table = Table(Column("task", no_wrap=True), *names, title=f"{results.suite.name}, means so far", box=SIMPLE_HEAD)
    for i, name in enumerate(head[1:], start=1):
        table.add_row(printable(name), *(row[i] for row in rows))
    return table


def _write(results: Results, folder: Path) -> int:
    """Writes table.md and leaderboard.html; prints the table of means."""
    atomic.make_folder(folder, parents=True)
    atomic.write(folder / "table.md", markdown(results))
    atomic.write(folder / "leaderboard.html", page(results))
    Console().print(as_table(results))
    failed = sum(row["status"] != "ok" for row in results.rows)
    if failed:
        note(f"{failed} runs failed and count at the reference's level: {folder / 'table.md'} says why")
    print(printable(str(folder / "table.md")))
    print(printable(str(folder / "leaderboard.html")))
    return 0


def _verify(options: Benchmark) -> int:
    def show(progress: Progress) -> None:
        note(f"{progress.done}/{progress.total} {progress.text}")

    workers = Workers(options.jobs, time_limit=options.time_limit)
    verdict: Verdict = verify(options.files, options.cells, workers, report=show)
    for rerun in verdict.reruns:
        found = "failed" if rerun.found is None else f"{rerun.found:.4f}"
        same = "the same" if rerun.same else "not the same"
        print(printable(f"{rerun.cell.name}: recorded {rerun.recorded:.4f}, found {found}: {same}"))
    print(f"mean difference {verdict.difference}")
    print(printable(f"{'confirmed' if verdict.confirmed else 'NOT confirmed'}: {verdict.reason}"))
    return 0 if verdict.confirmed else 1
