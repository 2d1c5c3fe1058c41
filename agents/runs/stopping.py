"""When a run saves its state, and when it stops: limits, Ctrl-C, SIGTERM."""

import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from agents.training import require
from lmgym.ranks import current

TIME_LIMIT_STATUS = 3
"""The exit status of a run that reached its time limit."""


@dataclass(frozen=True)
class Limits:
    """When a run saves its state, and when it ends."""

    checkpoint_seconds: float = 10.0
    """Minimum seconds between two checkpoints; saving also never takes more than 1/40 of the time. 0 saves after each
    update."""
    keep_checkpoints: int = 2
    """Number of most recent checkpoints to keep."""
    max_time: float = 0.0
    """Seconds after which the run saves its state and ends with exit status 3, to be resumed later; 0: no limit."""

    def __post_init__(self) -> None:
        require.in_range(self, "checkpoint_seconds", least=0.0)
        require.in_range(self, "keep_checkpoints", least=1)
        require.in_range(self, "max_time", least=0.0)


class Stopped(Exception):
    """The run was asked to stop early; its state is saved.

    Attributes:
        status: the exit status: 130 after Ctrl-C, 143 after SIGTERM, 3 at the time limit.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class StopRequest:
    """Whether a run should stop after the present step: because of a signal, or because its time is up.

    Args:
        started: when the run began, by `time.perf_counter`.
        max_time: its time limit in seconds; 0: no limit.
    """

    def __init__(self, started: float, max_time: float):
        self.started = started
        self.max_time = max_time
        self._signal: signal.Signals | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """Handles SIGINT and SIGTERM from now on; outside the main thread, where Python allows no handlers, nothing."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous_handlers[number] = signal.signal(number, self._on_signal)

    def restore_handlers(self) -> None:
        """Puts back the handlers that were there before `listen`."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    @property
    def status(self) -> int | None:
        """The exit status to stop with; None: continue."""
        if self._signal is not None:
            return 128 + self._signal
        out_of_time = self.max_time and time.perf_counter() - self.started >= self.max_time
        return TIME_LIMIT_STATUS if out_of_time else None

    def reason(self, status: int) -> str:
        """What a status means, in words."""
        if status == TIME_LIMIT_STATUS:
            return f"the time limit of {self.max_time:g} s"
        return signal.Signals(status - 128).name

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt(128 + number)
        self._signal = signal.Signals(number)
        if current().rank:  # rank 0 says it
            return
        # Not through the console, which may be in the middle of a line.
        with suppress(OSError):
            os.write(2, b"\nlmgym: finishing this step and saving; interrupt again to stop immediately\n")
