"""Trains reward models in the background, in a process of its own, whenever there are enough new labels."""

import subprocess
from collections.abc import Sequence
from pathlib import Path


class Retrainer:
    """Starts a command after every so many labels; never two at once.

    Args:
        command: trains on the labels of the store, and writes scores into it.
        every: the number of labels between two trainings.
        log: receives what the command prints.
        labels: the number of labels now.
    """

    def __init__(self, command: Sequence[str], every: int, log: Path, labels: int = 0) -> None:
        self.command, self.every, self.log = list(command), every, log
        self.trained_on = labels - labels % every
        self._running: subprocess.Popen[bytes] | None = None

    def look(self, labels: int) -> bool:
        """Starts a training if it is time; returns whether it did."""
        if labels < self.trained_on + self.every or (self._running is not None and self._running.poll() is None):
            return False
        self.trained_on = labels
        with self.log.open("ab") as log:
            self._running = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return True

    def close(self) -> None:
        """Ends a training that is under way; its result is not written."""
        if self._running is not None and self._running.poll() is None:
            self._running.terminate()
            self._running.wait()
