"""A run that is read and not continued: its finished stages, and its newest checkpoint."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from agents.runs.checkpoint import Checkpoints
from agents.runs.following import FollowingRun
from agents.runs.resume import Resumption, RunState, foreign_checkpoint
from agents.training import Stateful


class StoredRun(FollowingRun):
    """What the stages get in place of a run's folder when an update is computed again: nothing is written.

    Args:
        folder: of a run that may be finished, interrupted or still running.
        say: receives messages for the user.

    Raises:
        ValueError: it has no checkpoint.
        Damaged: all its checkpoints are damaged.
    """

    def __init__(self, folder: Path, say: Callable[[str], object]):
        self.folder, self.console, self.started = folder, Console(quiet=True), time.perf_counter()
        self._tell = say
        checkpoints = Checkpoints(folder / "checkpoints")
        state = checkpoints.newest(say)
        if state is None:
            raise ValueError(f"{str(folder)!r} has no checkpoint yet: wait until its first stage is finished")
        with foreign_checkpoint(checkpoints.folder):
            self._resumption: Resumption | None = Resumption(state)
            self._state = RunState.of(state.part("run"))

    def say(self, text: str) -> None:
        """Passes a message on."""
        self._tell(text)

    def stage_result(self, stage: str) -> Any:
        """The result that a finished stage left.

        Raises:
            ValueError: the stage is not finished.
        """
        result = super().stage_result(stage)
        if result is None:
            raise ValueError(
                f"{str(self.folder)!r} has not finished the stage {stage!r}, so RL has not begun: continue it with "
                f"`lmgym train --resume {self.folder}`"
            )
        return result

    def updates_done(self, stage: str) -> int:
        """The updates after which the newest checkpoint was made; 0 if it does not hold the state of that stage."""
        return self._state.step if self._state.stage == stage else 0

    def restore(self, stage: str, parts: Mapping[str, Stateful]) -> None:
        """Puts the parts of a stage back, as they were after `updates_done` updates."""
        assert self._resumption is not None
        with foreign_checkpoint(self.folder / "checkpoints"):
            self._resumption.restore(stage, parts)
