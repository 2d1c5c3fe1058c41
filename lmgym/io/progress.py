"""Progress inside an update: slow loops report how far they are, and whoever runs them may listen."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Report = Callable[[str, int, int, int], object]
"""Receives the name of a phase, how many of its parts are done, how many there are, and the tokens of those done."""

_listener: ContextVar[Report | None] = ContextVar("progress", default=None)


@contextmanager
def listen(report: Report) -> Iterator[None]:
    """Passes on to `report` what loops inside the body report."""
    before = _listener.get()
    _listener.set(report)
    try:
        yield
    finally:
        _listener.set(before)


def report_progress(phase: str, done: int, total: int, tokens: int) -> None:
    """Reports the progress of a phase, if somebody listens.

    Args:
        phase: its name, such as "rollout".
        done: how many of its parts are done; after the last one the phase is over.
        total: how many parts it has.
        tokens: the number of tokens of the parts that are done.
    """
    report = _listener.get()
    if report is not None:
        report(phase, done, total, tokens)
