"""The progress of a stage on the console: bars in a terminal, a line now and then in a log file.

A stage has steps; a step of a large model takes a minute, so that the rollout and each epoch of a step are shown too.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lmgym.io import listen

LINES = 10
"""Lines per stage in a log file; where the number of steps is unknown, steps per line."""
SILENT_SECONDS = 30.0
"""In a log file, a step that takes longer than this says how far it is, once in this time."""
FAST_SECONDS = 1.0
"""In a terminal, a phase of a step is shown if it takes longer than this."""

Advance = Callable[[str], None]
"""Moves the progress by one step, with a text to show."""


@contextmanager
def show_progress(
    console: Console, say: Callable[[str], object], stage: str, total: int | None, done: int
) -> Iterator[Advance]:
    """Shows a stage's progress while the body runs.

    Args:
        console: where it is shown.
        say: prints a line.
        stage: its name.
        total: number of steps; None: unknown.
        done: steps that are already done.
    """
    if not console.is_terminal:
        lines = _Lines(say, stage, total, done)
        with listen(lines.report):
            yield lines.advance
        return
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description:14}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[live]}"),
    )
    with Progress(*columns, console=console) as progress:
        bars = _Bars(progress, stage, total, done)
        with listen(bars.report):
            yield bars.advance


class _Phase:
    """The phase that a step is in, and since when."""

    def __init__(self) -> None:
        self.name, self.done = "", 0
        self.began = self.last = time.perf_counter()

    def update(self, name: str, done: int) -> None:
        """A report has come. Another name, or fewer parts than before: a phase began when the last report came."""
        if name != self.name or done < self.done:
            self.began = self.last
        self.name, self.done, self.last = name, done, time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.last - self.began

    def speed(self, tokens: int) -> str:
        """Tokens per second, in words."""
        return f"{tokens / max(1e-9, self.seconds):,.0f} tokens/s"


class _Bars:
    """A bar for the stage, and one below it for the phase of a step."""

    def __init__(self, progress: Progress, stage: str, total: int | None, done: int):
        self.progress, self.done, self.phase = progress, done, _Phase()
        self.began, self.first = time.perf_counter(), done
        self.stage = progress.add_task(stage, total=total, completed=done, live="", speed="")
        self.inner: TaskID | None = None

    def advance(self, text: str) -> None:
        """One step of the stage is done."""
        self.done += 1
        speed = f"{(self.done - self.first) / (time.perf_counter() - self.began):.1f}/s"
        self.progress.update(self.stage, advance=1, live=text, speed=speed)
        self._end_phase()
        self.phase = _Phase()

    def report(self, name: str, done: int, total: int, tokens: int) -> None:
        """A phase of the step has come so far."""
        new = name != self.phase.name
        self.phase.update(name, done)
        if new or done >= total:
            self._end_phase()
        if done < total and self.phase.seconds > FAST_SECONDS:
            if self.inner is None:
                self.inner = self.progress.add_task(f"  {name}", total=total, live="", speed="")
            self.progress.update(self.inner, completed=done, total=total, speed=self.phase.speed(tokens))

    def _end_phase(self) -> None:
        if self.inner is not None:
            self.progress.remove_task(self.inner)
            self.inner = None


class _Lines:
    """A line for some steps of the stage, and one now and then inside a slow step."""

    def __init__(self, say: Callable[[str], object], stage: str, total: int | None, done: int):
        self.say, self.stage, self.total, self.done, self.phase = say, stage, total, done, _Phase()
        self.every = max(1, total // LINES) if total else LINES
        self.spoke = time.perf_counter()

    def advance(self, text: str) -> None:
        """One step of the stage is done."""
        self.done += 1
        self.phase = _Phase()
        if self.done % self.every == 0 or self.done == self.total:
            self._say(f"{self.stage} {self.done}{self._of}  {text}")

    def report(self, name: str, done: int, total: int, tokens: int) -> None:
        """A phase of the step has come so far."""
        self.phase.update(name, done)
        if time.perf_counter() - self.spoke > SILENT_SECONDS:
            self._say(f"{self.stage} {self.done + 1}{self._of}  {name} {done}/{total}, {self.phase.speed(tokens)}")

    @property
    def _of(self) -> str:
        return f"/{self.total}" if self.total else ""

    def _say(self, text: str) -> None:
        self.say(text)
        self.spoke = time.perf_counter()
