"""A run's folder: its configuration, metrics, results and checkpoints.

A run that was interrupted is resumed from its newest checkpoint, and ends with the same bits as one that was not.
"""

import json
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from agents.runs.checkpoint import Checkpoints, write_state
from agents.runs.costs import PLAN_FILE
from agents.runs.files import FORMAT, finite, to_json
from agents.runs.lock import LOCK_FILE, FolderLock
from agents.runs.machine import hardware, revision, versions
from agents.runs.meter import Meter
from agents.runs.model_card import write_cards
from agents.runs.paths import confined
from agents.runs.progress import show_progress
from agents.runs.ranks import agreed, check_same_on_all_ranks, generators_of_all_ranks, wait_for_all
from agents.runs.resume import REMEDY, Resumption, RunState, check_same_run, foreign_checkpoint
from agents.runs.stopping import Limits, Stopped, StopRequest
from agents.runs.trackers import MetricsLog, tracking_service
from agents.training import BadStep, State, Stateful
from lmgym.io import atomic, printable
from lmgym.io.redact import redact, redact_all
from lmgym.ranks import current, tell
from lmgym.reward import ScoreError

FIRST_FILES = ("config.json", "metrics.json", "warnings.json", "metrics.jsonl", "tensorboard", PLAN_FILE)
"""What a run writes before its first result."""


class Run:
    """A run's folder: config.json, metrics.jsonl, checkpoints, and TensorBoard events where TensorBoard is installed.

    Args:
        folder: made if needed. If it holds an interrupted run with the same options, that run is resumed.
        options: all options, as plain data; saved in config.json with versions and revision.
        console: where progress is shown.
        track: services that also get the metrics: "wandb", "trackio". By default nothing is sent anywhere.
        limits: when it saves its state, and when it ends.
        arguments: the command line, so that `--resume` and `lmgym repeat` can run it again.
        inputs: SHA-256 of the files that the run reads, by name; it is resumed only with the same files.
        defaults: values of options that an interrupted run does not record, because it was made before they existed.

    Raises:
        ValueError: the folder holds another run, or something else; or all its checkpoints are damaged.
        ImportError: a service's package is not installed; the message names the extra.
        lmgym.io.atomic.WriteError: the folder cannot be written.
    """

    leads = True
    """Whether it writes: on rank 0."""
    meter: Meter | None = None
    """Measures what the stages cost, if it is set."""

    def __init__(
        self,
        folder: str | Path,
        options: Mapping[str, Any],
        console: Console | None = None,
        track: Sequence[str] = (),
        *,
        limits: Limits | None = None,
        arguments: Sequence[str] | None = None,
        inputs: Mapping[str, str] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ):
        services = [tracking_service(name) for name in track]
        self.folder = Path(folder)
        self.console = console or Console()
        self.limits = limits or Limits()
        self.started = time.perf_counter()
        self._state = RunState()
        self._command = arguments[0] if arguments else "train"
        self._checkpoints = Checkpoints(self.folder / "checkpoints", self.limits.keep_checkpoints)
        self._resumption: Resumption | None = None
        self._stop = StopRequest(self.started, self.limits.max_time)
        options = redact_all(options)
        config = json.loads(to_json(configuration(options, arguments, inputs) | working_folder(self.folder)))
        self._defaults = json.loads(to_json(defaults or {}))
        check_same_on_all_ranks(config)
        self._open(config, services)
        self._saved_at, self._save_seconds, self._all_save_seconds = time.perf_counter(), 0.0, 0.0

    def _open(self, config: Mapping[str, Any], services: Sequence[Any]) -> None:
        """Takes the folder, and continues the run that is interrupted there, if there is one."""
        # Before the lock, too: a folder that is not this run's stays as it is.
        if self.folder.exists() and (not self.folder.is_dir() or _is_occupied(self.folder)):
            check_same_run(self.folder, config, self.resume_command, self._defaults)
        else:
            atomic.make_folder(self.folder, parents=True)
        self._lock = FolderLock(self.folder)
        try:
            if _is_occupied(self.folder):
                self._resume(config)
            else:
                self.write("config.json", config)
            length = self._state.metrics_bytes if self._resumption else None
            self._metrics = MetricsLog(self.folder, services, config["options"], length)
            tell(None if self._resumption is None else str(self._checkpoints.newest_path))
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> "Run":
        self._stop.listen()
        return self

    def __exit__(self, kind: object, failure: object, _: object) -> None:
        self._stop.restore_handlers()
        try:
            self._metrics.close()
            save_reproduction(self, failure)
            if failure is not None and not isinstance(failure, Stopped):
                remove_if_unused(self.folder)
                if self._checkpoints.all():
                    self.say(f"the progress until then is saved; to resume: {self.resume_command}")
        finally:
            self._lock.release()
            wait_for_all(failure)

    # Stages and checkpoints ------------------------------------------------------------------------------------------

    def _resume(self, config: Mapping[str, Any]) -> None:
        """Continues the interrupted run in the folder, if it is the same one."""
        changed = check_same_run(self.folder, config, self.resume_command, self._defaults)
        state = self._checkpoints.newest(self.say)
        if state is None and (self.folder / "evaluation.json").exists():
            raise ValueError(f"{str(self.folder)!r} holds results, and no checkpoint to resume from: {REMEDY}")
        where = "from its beginning"
        if state is not None:
            with foreign_checkpoint(self._checkpoints.folder):
                self._resumption = Resumption(state)
                self._state = RunState.of(state.part("run"))
            at_step = f"after step {self._state.step} of {self._state.stage}"
            where = at_step if self._state.stage else "between two stages"
        if self._state.complete:
            raise ValueError(f"{str(self.folder)!r} holds another run, which is finished: {REMEDY}")
        for name in changed:
            self.warn(f"{name} changed while the run was interrupted, so it may end with different bits")
        self.say(f"resuming the interrupted run in {self.folder}, {where}")

    def stage_result(self, stage: str) -> Any:
        """The result that a finished stage left with `finish_stage`; None while it is not finished.

        Raises:
            ValueError: what the stage wrote has changed since.
        """
        done = self._state.finished.get(stage)
        if done is None:
            return None
        for name, checksum in done["outputs"].items():
            if not self.path(name).exists() or atomic.digest(self.path(name)) != checksum:
                raise ValueError(
                    f"{str(self.path(name))!r} is not what the run wrote there (damaged, changed or removed), so the "
                    "run cannot be resumed: restore it, or start again with another --out"
                )
        if self._resumption is not None:
            with foreign_checkpoint(self._checkpoints.folder):
                self._resumption.passes(stage)
        return done["result"]

    def finish_stage(self, stage: str, result: Any = True, outputs: Sequence[str] = ()) -> None:
        """Marks a stage as finished, so that a resumed run does not repeat it.

        Args:
            stage: its name.
            result: plain data that later stages need.
            outputs: files and folders that the stage wrote, and that later stages read.
        """
        digests = {name: atomic.digest(self.path(name)) for name in outputs}
        self._state.finished[stage] = {"result": result, "outputs": digests}
        self.checkpoint()
        self.end_measurement(stage)
        self._stop_if(agreed(False, self._stop.status)[1])

    def complete(self) -> None:
        """Marks the run as finished, and writes the cards of its models."""
        self.checkpoint(complete=True)
        write_cards(self.folder)  # not before: a resumed run compares the folders with what it wrote
        total = time.perf_counter() - self.started
        self.say(f"checkpoints took {self._all_save_seconds:.2f} s, {self._all_save_seconds / total:.1%} of the time")
        for path in self._checkpoints.all()[:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def checkpoint(
        self,
        stage: str = "",
        step: int = 0,
        stateful: Mapping[str, Stateful] | None = None,
        row: Mapping[str, float] | None = None,
        complete: bool = False,
    ) -> None:
        """Saves the run's state.

        Raises:
            lmgym.io.atomic.WriteError: it could not be saved; the checkpoint before it is still there.
        """
        began = time.perf_counter()
        self._metrics.sync()
        run = self._state
        run.stage, run.step, run.row, run.complete = stage, step, dict(row or {}), complete
        run.metrics_bytes, run.seconds = self._metrics.length, self.seconds()
        parts = {name: part.state() for name, part in (stateful or {}).items()}
        state = State.of({"run": run.state(), **generators_of_all_ranks()} | parts)
        self._checkpoints.save("complete" if complete else f"{stage or 'between'}-{step}", state)
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - began
        self._all_save_seconds += self._save_seconds

    def track_stage(
        self,
        stage: str,
        rows: Iterator[Mapping[str, float]],
        total: int | None,
        show: Mapping[str, str],
        stateful: Mapping[str, Stateful] | None = None,
        resumable: Callable[[], bool] = lambda: True,
    ) -> Iterator[Mapping[str, float]]:
        """Logs the metrics that a stage yields, shows its progress, saves checkpoints, and passes the metrics on.

        Args:
            stage: its name.
            rows: an algorithm's `train`.
            total: number of rows, where it is known.
            show: labels of the live figures, and the metrics that they show.
            stateful: everything that changes from row to row and is in no file yet. A resumed run restores it before
                `rows` begins. Without it, an interrupted stage begins again.
            resumable: whether `stateful` is enough to resume from; called after each row.

        Raises:
            Stopped: the run was asked to stop; its state is saved.
        """
        first, metrics = 0, {}
        if self._resumption is not None:
            with foreign_checkpoint(self._checkpoints.folder):
                first, metrics = self._resumption.restore(stage, stateful or {})
        if stage in self._state.last_rows:
            return
        if self.meter:
            self.meter.enter()
        with show_progress(self.console, self.say, stage, total, first) as advance:
            for step, metrics in enumerate(rows, start=first):
                self.log(stage, step, metrics)
                if self.meter:
                    self.meter.step(stage, step + 1, total, metrics)
                advance("  ".join(f"{label} {metrics[name]:.3g}" for label, name in show.items() if name in metrics))
                yield metrics
                self._after_step(stage, step + 1, metrics, stateful if resumable() else None)
        self._state.last_rows[stage] = dict(metrics)
        if self.meter:
            self.meter.leave(stateful or {})

    def _after_step(
        self, stage: str, step: int, row: Mapping[str, float], stateful: Mapping[str, Stateful] | None
    ) -> None:
        """Between two steps: saves the state if it is time, and stops if that was requested."""
        since = time.perf_counter() - self._saved_at
        every = self.limits.checkpoint_seconds and max(self.limits.checkpoint_seconds, 40 * self._save_seconds)
        due, status = agreed(since >= every, self._stop.status)
        if stateful is not None and (status is not None or due):
            self.checkpoint(stage, step, stateful, row)
        self._stop_if(status, f"{stage} {step}")

    def end_measurement(self, stage: str) -> None:
        """Ends a stage for the meter, if there is one."""
        if self.meter:
            self.meter.end(stage)

    def _stop_if(self, status: int | None, where: str = "") -> None:
        if status is not None:
            after = f" after {where}" if where else ""
            raise Stopped(f"stopped by {self._stop.reason(status)}{after}; to resume: {self.resume_command}", status)

    @property
    def resume_command(self) -> str:
        """The command line that resumes the run."""
        folder = str(self.folder)
        between = "=" if folder.startswith("-") else " "
        return f"lmgym {self._command} --resume{between}{shlex.quote(folder)}"

    def last_metrics(self, stage: str) -> Mapping[str, float]:
        """The last metrics of a stage that `track_stage` has seen to its end."""
        return self._state.last_rows[stage]

    # Files and console -----------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A path in the folder.

        Raises:
            ValueError: the name leads out of it.
        """
        return confined(self.folder, name)

    def write(self, name: str, data: Any) -> None:
        """Writes a JSON file."""
        atomic.write(self.path(name), to_json(data))

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a JSON Lines file."""
        atomic.write(self.path(name), "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))

    def write_folder(self, name: str, writer: Callable[[Path], object]) -> None:
        """Writes a folder, with a function that gets the path of an empty one. It is there on every rank afterwards."""
        atomic.write_folder(self.path(name), writer)
        current().barrier()

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row of metrics; in the file, a value that is not finite is null."""
        self._metrics.append(stage, step, self.seconds(), metrics)

    def warn(self, text: str) -> None:
        """Warns the user that something is probably wrong, and saves the warning for the report."""
        self._state.warnings.append(text)
        self.write("warnings.json", self._state.warnings)
        self.say(f"warning: {text}")

    def say(self, text: str) -> None:
        """Prints a line with the time."""
        # The text is not read as markup: it may hold the name of a folder such as "[bold]", or what a model wrote.
        line = Text.assemble((f"{time.perf_counter() - self.started:6.1f} s", "dim"), f"  {printable(text)}")
        self.console.print(line, soft_wrap=True)

    def seconds(self) -> float:
        """The run's time until now, without the time that it was interrupted."""
        before = self._resumption.run.seconds if self._resumption else 0.0
        return before + time.perf_counter() - self.started


def save_reproduction(run: Run, failure: object) -> None:
    """Writes the data of a failure whose cause is data, and says so."""
    if isinstance(failure, (BadStep, ScoreError)):
        state = failure.reproduction if isinstance(failure, BadStep) else State(vars(failure))
        with suppress(OSError):
            write_state(run.path("bad_step"), state)
            run.say(f"the data of the failure is in {run.path('bad_step')}")


def remove_if_unused(folder: Path) -> None:
    """Empties a run's folder if it failed before its first result, so that the folder can be used again."""
    own = {folder / name for name in FIRST_FILES}
    with suppress(OSError):
        if set(folder.iterdir()) <= {*own, folder / LOCK_FILE} and not (folder / "metrics.jsonl").stat().st_size:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            for path in own:
                path.unlink(missing_ok=True)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a run that came to its end.

    Raises:
        Damaged: all its checkpoints are damaged.
    """
    state = Checkpoints(folder / "checkpoints").newest(lambda text: None)
    return state is not None and RunState.of(state.part("run")).complete


def configuration(
    options: Mapping[str, Any], arguments: Sequence[str] | None, inputs: Mapping[str, str] | None
) -> dict[str, Any]:
    """The contents of config.json.

    Args:
        options: all options, without secrets.
        arguments: the command line of lmgym; None: the process was started otherwise.
        inputs: SHA-256 of the files that the run reads, by name.
    """
    command = redact(shlex.join(sys.argv[1:] if arguments is None else arguments))
    return {
        "format": FORMAT,
        "command": f"lmgym {command}",
        "arguments": None if arguments is None else _split(command),
        "task": options.get("task"),
        "model": options.get("model"),
        "seed": options.get("seed"),
        "options": options,
        "inputs": inputs or {},
        "versions": {"python": platform.python_version()} | versions(),
        "revision": revision(),
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "ranks": current().world,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def working_folder(folder: Path) -> dict[str, str]:
    """The entry of config.json from which the paths in the command begin, as seen from the run's folder.

    It is empty where there is no such path, between two drives of Windows.
    """
    try:
        return {"working_folder": Path(os.path.relpath(Path.cwd(), folder)).as_posix()}
    except ValueError:
        return {}


def _split(command: str) -> list[str] | None:
    """A command's arguments; None where redacting a secret removed one of a pair of quotes."""
    try:
        return shlex.split(command)
    except ValueError:
        return None


def _is_occupied(folder: Path) -> bool:
    """Whether a folder holds more than what a run leaves that was killed before it began."""
    return any(
        path.name != LOCK_FILE and not (path.name.startswith(".") and path.name.endswith(".partial"))
        for path in folder.iterdir()
    )
