"""Runs the cells of an experiment in worker processes, and keeps what they return.

A cell that is done is skipped, so that the same call continues after anything: kill -9 loses at most the cells that
were running. A cell that raises, hangs or takes its process down is a row with that status, and the others go on.
"""

import multiprocessing
import os
import platform
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from agents.experiments.cells import Cell, Shard
from agents.experiments.results import ResultFile, Row, Status, read_results
from agents.experiments.worker import main as worker_main
from agents.runs import machine
from agents.runs.lock import FolderLock
from agents.runs.progress import show_progress
from agents.training import require
from lmgym.io import atomic

ATTEMPTS = 3
"""How often a cell is tried whose process dies: whether the cell or the system (out of memory) did it is unknown."""
START_SECONDS = 300.0
"""Time limit for a worker's start: importing torch can take long on a busy machine."""
TICK_SECONDS = 1.0
"""Maximum time between two looks at the clock."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Progress:
    """How far an experiment is, after a cell has ended.

    Attributes:
        row: the row of that cell.
        done: cells that are done, those of earlier calls included.
        failed: those of them without a result.
        total: number of cells.
        seconds_left: estimated seconds until the last one ends.
    """

    row: Row
    done: int
    failed: int
    total: int
    seconds_left: float

    @property
    def text(self) -> str:
        """What just ended, how many failed, and the time left, in words."""
        failed = f", {self.failed} failed" if self.failed else ""
        name = Cell.from_data(self.row).name
        return f"{name}: {self.row['status']}, {self.row['seconds']:.0f} s{failed}, {duration(self.seconds_left)} left"


@dataclass(frozen=True)
class Workers:
    """The worker processes that run cells."""

    jobs: int = 1
    """Number of worker processes: how many cells run at the same time."""
    threads: int = 1
    """Threads of each worker."""
    time_limit: float = 0.0
    """Maximum seconds for a cell, after which it counts as failed; 0: no limit."""

    def __post_init__(self) -> None:
        require.in_range(self, "jobs", least=1)
        require.in_range(self, "threads", least=1)
        require.in_range(self, "time_limit", least=0.0)


def run_cells(
    cells: Sequence[Cell],
    function: str,
    folder: str | os.PathLike[str],
    workers: Workers | None = None,
    *,
    shard: Shard | None = None,
    retry_failed: bool = False,
    console: Console | None = None,
    report: Callable[[Progress], object] = lambda progress: None,
) -> list[Row]:
    """Runs those cells of a shard that are not done, and appends a row for each to the shard's file in the folder.

    Args:
        cells: the experiment.
        function: "module:function", which the worker processes import. It takes a `Cell` and returns a dict of JSON
            data with finite numbers. The global random generators are seeded before each call.
        folder: where the results are; it is made if needed. A cell with a row in any of its `.jsonl` files is done.
        workers: number and limits of the worker processes.
        shard: which part of the cells to run; None: all.
        retry_failed: run cells again that ended without a result. Otherwise a failure stays: who runs cells until they
            succeed measures something else.
        console: shows the progress there.
        report: called after each cell.

    Returns:
        The rows of the shard's cells, in the order of the cells.

    Raises:
        ValueError: the function cannot be imported, a cell is given twice, a row is damaged, or another process runs
            this shard.
        RuntimeError: worker processes die while they start.
        lmgym.io.atomic.WriteError: a row cannot be written.
    """
    shard, folder, workers = shard or Shard(), Path(folder), workers or Workers()
    _refuse_duplicates(cells)
    mine = {cell.key: cell for cell in cells if shard.holds(cell)}
    atomic.make_folder(folder, parents=True)
    with _locked_file(folder, shard) as file:
        rows = {row["key"]: row for row in read_results(folder) if row["key"] in mine}
        todo = [cell for key, cell in mine.items() if key not in rows or (retry_failed and not _is_ok(rows[key]))]
        pool = _Pool(function, folder / f"{shard.name}.log", workers)
        done, facts = len(mine) - len(todo), {"function": function} | _facts(workers)
        progress = console_progress(console, len(mine), done) if console else nullcontext(lambda progress: None)
        with progress as show, closing(pool.run(todo)) as outcomes:  # closing ends the workers, whatever happens here
            began = time.perf_counter()
            for count, outcome in enumerate(outcomes, start=1):
                row = outcome | facts
                file.append(row)
                rows[row["key"]] = row
                left = (time.perf_counter() - began) / count * (len(todo) - count)
                state = Progress(row, done + count, sum(not _is_ok(row) for row in rows.values()), len(mine), left)
                show(state)
                report(state)
    return [rows[key] for key in mine]


@contextmanager
def _locked_file(folder: Path, shard: Shard) -> Iterator[ResultFile]:
    """The shard's file, which no other process writes. Whatever a kill left unfinished is cut off before it is read."""
    lock = FolderLock(folder, f".{shard.name}.lock")
    try:
        with closing(ResultFile(folder / f"{shard.name}.jsonl")) as file:
            yield file
    finally:
        lock.release()


@contextmanager
def console_progress(console: Console, total: int, done: int) -> Iterator[Callable[[Progress], None]]:
    """Shows the progress on a console: a bar in a terminal, lines in a log file. Yields what takes each `Progress`.

    Args:
        console: where it is shown.
        total: number of cells.
        done: how many are already done.
    """
    say = partial(console.print, markup=False, highlight=False)
    with show_progress(console, say, "cells", total, done) as advance:
        yield lambda progress: advance(escape(progress.text) if console.is_terminal else progress.text)


def duration(seconds: float) -> str:
    """A time in words: "40 s", "12 min", "3.5 h"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _refuse_duplicates(cells: Sequence[Cell]) -> None:
    count = Counter(cell.key for cell in cells)
    twice = next((cell for cell in cells if count[cell.key] > 1), None)
    if twice:
        raise ValueError(f"the cell is given twice: {twice.name}; remove one")


def _is_ok(row: Row) -> bool:
    return row["status"] == "ok"


def _facts(workers: Workers) -> Row:
    """What a row says about machine and software. The revision ends in "-dirty" if the code was changed since."""
    return {
        "versions": machine.versions() | {"python": platform.python_version()},
        "revision": machine.revision(),
        "hardware": machine.hardware(workers.threads),
        "threads": workers.threads,
        "jobs": workers.jobs,
    }


@dataclass(eq=False)
class _Worker:
    """A worker process.

    Attributes:
        process, connection: the process, and the connection to it.
        since: when it started, or got its cell, by `time.perf_counter`.
        ready: whether it has imported the function.
        cell: what it is running.
        started: when it got the cell, as a date.
    """

    process: Any
    connection: Connection
    since: float = field(default_factory=time.perf_counter)
    ready: bool = False
    cell: Cell | None = None
    started: str = ""

    def give(self, cell: Cell) -> None:
        """Lets it run a cell."""
        self.cell, self.since = cell, time.perf_counter()
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        with suppress(OSError):  # it died: its sentinel says so
            self.connection.send(cell.as_data())

    def received(self) -> Any:
        """What it has sent, or None."""
        try:
            return self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        """Ends it, and the processes that its cell started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (AttributeError, OSError):  # Windows; or it is dead, or has no group of its own yet
            self.process.kill()
        self.process.join()
        self.connection.close()


class _Pool:
    """The worker processes, at most `jobs` at a time.

    Args:
        function: "module:function".
        log: the file that gets what the cells print.
        options: number and limits of the processes.
    """

    def __init__(self, function: str, log: Path, options: Workers):
        self.function, self.log, self.options = function, log, options
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []
        self._todo: deque[Cell] = deque()
        self._deaths: dict[str, int] = {}
        self._failed_starts = 0

    def run(self, cells: Sequence[Cell]) -> Generator[Row, None, None]:
        """Runs cells; yields each one's fields and outcome when it ends."""
        self._todo.extend(cells)
        try:
            while self._todo or any(worker.cell for worker in self._workers):
                self._assign()
                signals = [s for worker in self._workers for s in (worker.connection, worker.process.sentinel)]
                wait(signals, self._patience())
                for worker in list(self._workers):
                    row = self._look_at(worker)
                    if row is not None:
                        yield row
        finally:
            for worker in self._workers:
                worker.kill()
            self._workers.clear()

    def _assign(self) -> None:
        """Gives cells to idle workers, and starts workers while there are more cells than workers that can take one."""
        for worker in self._workers:
            if worker.ready and worker.cell is None and self._todo:
                worker.give(self._todo.popleft())
        starting = sum(not worker.ready for worker in self._workers)
        for _ in range(min(self.options.jobs - len(self._workers), len(self._todo) - starting)):
            self._workers.append(self._start())

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self.function, self.options.threads, str(self.log))
        process = self._context.Process(target=worker_main, args=arguments, name="lmgym-cells")
        with _environment(self.options.threads):
            process.start()
        theirs.close()  # only the worker holds it now: its death ends the connection
        return _Worker(process, ours)

    def _patience(self) -> float:
        """Seconds until the next time limit, at most `TICK_SECONDS`."""
        limits = [self._limit(worker) - (time.perf_counter() - worker.since) for worker in self._workers]
        return max(0.0, min([TICK_SECONDS, *limits]))

    def _limit(self, worker: _Worker) -> float:
        """Seconds that what the worker is doing may take."""
        if not worker.ready:
            return START_SECONDS
        return self.options.time_limit if worker.cell and self.options.time_limit else float("inf")

    def _look_at(self, worker: _Worker) -> Row | None:
        """The row of a worker's cell, if it has ended in any way."""
        was_alive = worker.process.is_alive()  # before its last message is read
        message, seconds = worker.received(), time.perf_counter() - worker.since
        if message is not None and not worker.ready:
            self._started(worker, *message)
            return None
        if message is not None:
            return self._ended(worker, seconds, **message)
        if was_alive and seconds < self._limit(worker):
            return None
        self._workers.remove(worker)
        worker.kill()
        if not worker.ready:
            self._failed_to_start(worker)
        if worker.cell is None:
            return None
        if was_alive:
            return self._ended(
                worker, seconds, "timeout", f"it took longer than {self.options.time_limit:g} s and was ended"
            )
        return self._died(worker, worker.cell, seconds)

    def _started(self, worker: _Worker, status: str, text: str) -> None:
        if status == "unusable":
            raise ValueError(text)
        worker.ready, self._failed_starts = True, 0

    def _failed_to_start(self, worker: _Worker) -> None:
        self._failed_starts += 1
        if self._failed_starts == ATTEMPTS:
            raise RuntimeError(
                f"{ATTEMPTS} worker processes in a row ended before their first cell ({_ending(worker)}): read "
                f"{str(self.log)!r}; a script that calls run_cells needs `if __name__ == '__main__':`"
            )

    def _died(self, worker: _Worker, cell: Cell, seconds: float) -> Row | None:
        deaths = self._deaths[cell.key] = self._deaths.get(cell.key, 0) + 1
        if deaths < ATTEMPTS:
            self._todo.appendleft(cell)
            return None
        text = f"its process died {deaths} times, the last time by {_ending(worker)}: read {self.log.name}"
        return self._ended(worker, seconds, "died", text)

    def _ended(
        self,
        worker: _Worker,
        seconds: float,
        status: Status,
        error: str = "",
        result: dict[str, Any] | None = None,
        cpu_seconds: float | None = None,
    ) -> Row:
        cell, worker.cell = worker.cell, None
        assert cell is not None
        row = {"key": cell.key, **cell.as_data(), "seed": cell.seed, "status": status, "error": error, "result": result}
        deaths = self._deaths.get(cell.key, 0)
        row |= {"started": worker.started, "seconds": round(seconds, 3), "cpu_seconds": cpu_seconds, "deaths": deaths}
        return row


def _ending(worker: _Worker) -> str:
    """How a process ended, in words."""
    code = worker.process.exitcode
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit status {code}"


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """The number of threads in the environment that a new process inherits: libraries read it while they load."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
