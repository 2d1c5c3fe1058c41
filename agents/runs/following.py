"""The run of a rank above 0: it takes the same way as rank 0, which has the folder, and writes nothing."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from agents.runs.checkpoint import read_state
from agents.runs.folder import Run, save_reproduction
from agents.runs.ranks import agreed, generators_of_all_ranks, wait_for_all
from agents.runs.resume import Resumption, RunState, foreign_checkpoint
from agents.training import Stateful
from lmgym.ranks import current, tell
from lmgym.reward import ScoreError


class FollowingRun(Run):
    """What ranks above 0 have in place of a run's folder. Its files are read, by a path that all ranks must see."""

    leads = False

    def __init__(self, folder: str | Path, options: Mapping[str, Any], *, track: Sequence[str] = (), **more: Any):
        super().__init__(folder, options, Console(quiet=True), (), **more)

    def _open(self, config: Mapping[str, Any], services: Sequence[Any]) -> None:
        found = tell(None)
        if not (self.folder / "config.json").is_file():
            raise ValueError(
                f"rank {current().rank} does not see the folder {str(self.folder.absolute())!r} of rank 0: choose an "
                "--out that all machines share"
            )
        if found is None:
            return
        state = read_state(Path(found))
        with foreign_checkpoint(self._checkpoints.folder):
            self._resumption = Resumption(state)
            self._state = RunState.of(state.part("run"))

    def __exit__(self, kind: object, failure: object, _: object) -> None:
        self._stop.restore_handlers()
        if isinstance(failure, ScoreError):  # of this rank's rows, which rank 0 does not know
            save_reproduction(self, failure)
        wait_for_all(failure)

    def stage_result(self, stage: str) -> Any:
        """The result that a finished stage left; rank 0 checks its files."""
        done = self._state.finished.get(stage)
        if done is not None and self._resumption is not None:
            self._resumption.passes(stage)
        return None if done is None else done["result"]

    def finish_stage(self, stage: str, result: Any = True, outputs: Sequence[str] = ()) -> None:
        """Marks a stage as finished."""
        self._state.finished[stage] = {"result": result, "outputs": {}}
        self.checkpoint()
        self._stop_if(agreed(False, self._stop.status)[1])

    def complete(self) -> None:
        """Takes part in the last checkpoint."""
        self.checkpoint()

    def checkpoint(
        self,
        stage: str = "",
        step: int = 0,
        stateful: Mapping[str, Stateful] | None = None,
        row: Mapping[str, float] | None = None,
        complete: bool = False,
    ) -> None:
        """Gives rank 0 what it saves of this rank."""
        generators_of_all_ranks()

    def write(self, name: str, data: Any) -> None:
        """Nothing."""

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def write_folder(self, name: str, writer: Callable[[Path], object]) -> None:
        """Waits until rank 0 has written it."""
        current().barrier()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""
