"""A profile of one update: a table of its phases and operations, and a trace."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from agents.runs.folder import Run
from lmgym.io import atomic

PHASES = ("decode", "reference", "score", "forward", "backward", "step")
"""Phases that `lmgym` and `agents` mark with `torch.profiler.record_function("lmgym/…")`."""


def profiled(rows: Iterator[Mapping[str, float]], run: Run, update: int = 1) -> Iterator[Mapping[str, float]]:
    """Passes on an algorithm's updates, and profiles one of them.

    Writes `profile.txt` (phases, then operations) and `profile.json`, a trace for chrome://tracing or Perfetto, to the
    run's folder, and prints the phases.

    Args:
        rows: the updates.
        run: the run.
        update: the number of the update to profile, from 0. The first one is slower: it warms caches up.
    """
    for number in range(update):
        row = next(rows, None)
        if row is None:
            run.say(f"nothing was profiled: update {update + 1} was to be profiled, and there were only {number}")
            return
        yield row
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as found:
        row = next(rows, None)
    if row is None:
        run.say(f"nothing was profiled: update {update + 1} was to be profiled, and there were only {update}")
        return
    with atomic.staged(run.path("profile.json")) as aside:
        found.export_chrome_trace(str(aside))
    events = found.key_averages()
    seconds = {name: sum(e.cpu_time_total for e in events if e.key == f"lmgym/{name}") / 1e6 for name in PHASES}
    total = _seconds(found)
    lines = [f"{name:12} {spent:9.4f} s {spent / total:6.1%}" for name, spent in seconds.items()]
    lines.append(f"{'other':12} {total - sum(seconds.values()):9.4f} s {1 - sum(seconds.values()) / total:6.1%}")
    operations = events.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
    atomic.write(run.path("profile.txt"), "\n".join([*lines, "", operations]))
    table = Table(f"update {update + 1}", "seconds", "share")
    for line in lines:
        name, spent, _, share = line.split()
        table.add_row(name, spent, share)
    run.console.print(table)
    run.say(f"profile: {run.path('profile.txt')} and {run.path('profile.json')} (the profiler itself takes time too)")
    yield row
    yield from rows


def _seconds(found: Any) -> float:
    """Seconds from the first event to the last."""
    events = found.events()
    return (max(e.time_range.end for e in events) - min(e.time_range.start for e in events)) / 1e6
