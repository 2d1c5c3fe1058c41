"""The progress of a stage on the console: a bar in a terminal, a line now and then in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINES = 10
"""Lines per stage in a log file; where the number of steps is unknown, steps per line."""

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
        yield _lines(say, stage, total, done)
        return
    columns = (
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
        task = progress.add_task(stage, total=total, completed=done, live="", speed="")
        began, first = time.perf_counter(), done

        def advance(text: str) -> None:
            completed = progress.tasks[0].completed + 1
            speed = f"{(completed - first) / (time.perf_counter() - began):.1f}/s"
            progress.update(task, advance=1, live=text, speed=speed)

        yield advance


def _lines(say: Callable[[str], object], stage: str, total: int | None, done: int) -> Advance:
    every = max(1, total // LINES) if total else LINES

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        if done % every == 0 or done == total:
            say(f"{stage} {done}{f'/{total}' if total else ''}  {text}")

    return advance
