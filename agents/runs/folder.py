"""A run's folder: what was asked for, what was measured, where it stands, and progress on the console meanwhile.

A run that was interrupted goes on from its newest checkpoint and ends with the same bits as one that was not.
"""

import importlib
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from agents.runs.checkpoint import Checkpoints, finite, write_state
from agents.runs.machine import hardware, revision, versions
from agents.runs.paths import confined
from agents.runs.randomness import GlobalGenerators
from agents.training import BadStep, State, Stateful
from lmgym.io import atomic, printable, read_lines
from lmgym.io.redact import redact, redact_all
from lmgym.reward import ScoreError

_OWN = ("config.json", "metrics.json", "warnings.json")
FREE = ("out", "resume", "threads", "track", "limits")
"""Options that may differ when a run goes on: they change nothing but rounding."""


@dataclass(frozen=True)
class Limits:
    """When a run saves where it stands, and when it ends."""

    checkpoint_seconds: float = 10.0
    """Least time between two checkpoints; also, saving never takes more than a fortieth of the time. 0 saves after each
    update."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    max_time: float = 0.0
    """Seconds after which the run saves and ends, with exit status 3, to be resumed later; 0 is no limit."""


class Stopped(Exception):
    """The run was asked to end early, and is saved.

    Attributes:
        status: the exit status: 130 after Ctrl-C, 143 after SIGTERM, 3 at the time limit.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Run:
    """A run's folder: config.json, metrics.jsonl, checkpoints, and TensorBoard events where TensorBoard is installed.

    Args:
        folder: made if needed. If it holds an interrupted run with the same options, that run goes on.
        options: everything that was asked for, as plain data; kept in config.json with versions and revision.
        console: where progress is shown.
        track: services to send the metrics to as well: "wandb", "trackio". Nothing is sent anywhere unless asked for.
        limits: when it saves and ends.
        arguments: the command line, so that `--resume` and `lmgym repeat` can give it again.
        inputs: SHA-256 of the files that the run reads, by name; an interrupted run goes on only with the same.

    Raises:
        ValueError: the folder holds another run, or something else; or all its checkpoints are damaged.
        ImportError: a service's package is not installed; it names the extra.
        lmgym.io.atomic.WriteError: the folder cannot be written.
    """

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
    ):
        trackers = [_tracker(name) for name in track]
        self.folder = Path(folder)
        self.console = console or Console()
        self.limits = limits or Limits()
        self.started = time.perf_counter()
        self.finished: dict[str, Any] = {}
        self.warnings: list[str] = []
        self._command = arguments[0] if arguments else "train"
        self._checkpoints = Checkpoints(self.folder / "checkpoints", self.limits.keep_checkpoints)
        self._state: State | None = None
        self._given: set[str] = set()
        self._followed: dict[str, dict[str, float]] = {}
        command = redact(shlex.join(sys.argv[1:] if arguments is None else arguments))
        options = redact_all(options)
        config = {
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
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        taken_up = self.folder.exists() and (not self.folder.is_dir() or _holds_something(self.folder))
        if not taken_up:
            atomic.make_folder(self.folder, parents=True)
        self._lock = _lock(self.folder)
        try:
            if taken_up:
                self._take_up(json.loads(_json(config)))
            else:
                self.write("config.json", config)
            self._open(trackers, options)
        except BaseException:
            os.close(self._lock)
            raise
        self._saved, self._cost, self._saving = time.perf_counter(), 0.0, 0.0
        self._asked_to_stop: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def _open(self, trackers: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Opens what metrics are written to, behind the rows that count."""
        stands = self._state.part("run") if self._state else State({"metrics_bytes": 0, "seconds": 0})
        path = self.path("metrics.jsonl")
        try:
            self._metrics = atomic.Lines(path, stands.count("metrics_bytes"))
            rows = [_checked(row) for row in read_rows(path)] if self._state else []
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} is not what the run wrote there ({error}), so that it cannot go on: put it back, or "
                "start again with another --out"
            ) from error
        self._before = float(stands.number("seconds", 0.0))
        self._board = _tensorboard(self.folder, rows)
        self._trackers = trackers
        for tracker in trackers:
            tracker.init(project="lmgym", name=self.folder.name, config=json.loads(json.dumps(options, default=str)))

    def __enter__(self) -> "Run":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: object, failure: object, _: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        try:
            self._end(failure)
        finally:
            os.close(self._lock)

    def _end(self, failure: object) -> None:
        self._metrics.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        for tracker in self._trackers:
            tracker.finish()
        if isinstance(failure, BadStep):
            self._keep_reproduction(failure.reproduction)
        elif isinstance(failure, ScoreError):
            self._keep_reproduction(State(vars(failure)))
        if failure is not None and not isinstance(failure, Stopped):
            self._withdraw()
            if self._checkpoints.all():
                self.say(f"what was done until then is saved; to go on: {self._again()}")

    # Where it stands -----------------------------------------------------------------------------------------------

    def _take_up(self, config: Mapping[str, Any]) -> None:
        """Goes on with the interrupted run in the folder, if this is the same one."""
        path = self.folder / "config.json"
        remedy = "nothing was changed. Choose another --out, or remove it first"
        if not path.is_file():
            raise ValueError(f"{str(self.folder)!r} is not an empty folder: {remedy}")
        old = read_config(self.folder)
        found = differences(old.get("options"), config["options"])
        if found:
            raise ValueError(
                f"{str(self.folder)!r} holds another run ({'; '.join(found[:3])}): {remedy}; or go on with that "
                f"one: {self._again()}"
            )
        known = old.get("inputs")
        known = known if isinstance(known, dict) else {}
        changed = [name for name, value in config["inputs"].items() if known.get(name) != value]
        data = [name for name in changed if not name.endswith(".py")]
        if data:
            raise ValueError(
                f"{data[0]} has changed since the run in {str(self.folder)!r} began, so that it cannot go on: put back "
                "what was there, or start again with another --out"
            )
        self._state = self._checkpoints.newest(self.say)
        if self._state is None and (self.folder / "evaluation.json").exists():
            raise ValueError(f"{str(self.folder)!r} holds results, and no checkpoint to go on from: {remedy}")
        with self._fitting():
            self._stand(old, config, changed, remedy)

    def _stand(self, old: Mapping[str, Any], config: Mapping[str, Any], changed: Sequence[str], remedy: str) -> None:
        """Takes over what the checkpoint says of the run as a whole."""
        stands = self._state.part("run").data if self._state else {}
        if stands.get("complete"):
            raise ValueError(f"{str(self.folder)!r} holds another run, which is finished: {remedy}")
        self.finished = {
            stage: {"result": done["result"], "products": {**done["products"]}}
            for stage, done in stands.get("finished", {}).items()
        }
        self.warnings = list(stands.get("warnings", []))
        self._followed = {stage: {**row} for stage, row in stands.get("followed", {}).items()}
        others = [
            f"the {name}" for name in ("revision", "versions", "hardware", "threads") if old.get(name) != config[name]
        ]
        for name in [*others, *changed]:
            self.warn(f"{name} changed while the run was interrupted, so that it may end with other bits")
        at = f"after step {stands['step']} of {stands['stage']}" if stands.get("stage") else "between two stages"
        self.say(f"going on with the interrupted run in {self.folder}, {at if self._state else 'from its beginning'}")

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Says of a checkpoint that is whole, and was not written by this program, that it is not."""
        try:
            yield
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            folder = str(self._checkpoints.folder)
            raise ValueError(f"the checkpoint in {folder!r} is whole, but none of this run's ({why})") from error

    def result(self, stage: str) -> Any:
        """What a stage that is finished left with `finish`; None while it is not.

        Raises:
            ValueError: what the stage wrote is no longer what it was.
        """
        done = self.finished.get(stage)
        if done is None:
            return None
        for name, checksum in done["products"].items():
            if not self.path(name).exists() or atomic.digest(self.path(name)) != checksum:
                raise ValueError(
                    f"{str(self.path(name))!r} is not what the run wrote there (damaged, changed or removed), so that "
                    "it cannot go on: put it back, or start again with another --out"
                )
        if self._state is not None and stage == list(self.finished)[-1] and not self._state.part("run").data["stage"]:
            self._arrive(self._state)
        return done["result"]

    def finish(self, stage: str, result: Any = True, products: Sequence[str] = ()) -> None:
        """Marks a stage as finished, so that a run that goes on does not repeat it.

        Args:
            stage: its name.
            result: plain data that later stages need.
            products: files and folders that the stage wrote, and that later stages read.
        """
        self.finished[stage] = {"result": result, "products": {n: atomic.digest(self.path(n)) for n in products}}
        self.checkpoint()
        self._stop_if_asked()

    def complete(self) -> None:
        """Marks the run as finished."""
        self.checkpoint(complete=True)
        whole = time.perf_counter() - self.started
        self.say(f"checkpoints took {self._saving:.2f} s, {self._saving / whole:.1%} of the time")
        for path in self._checkpoints.all()[:-1]:
            shutil.rmtree(path, ignore_errors=True)

    def checkpoint(
        self,
        stage: str = "",
        step: int = 0,
        keep: Mapping[str, Stateful] | None = None,
        row: Mapping[str, float] | None = None,
        complete: bool = False,
    ) -> None:
        """Saves where the run stands.

        Raises:
            lmgym.io.atomic.WriteError: it could not be saved; the checkpoint before it is still there.
        """
        began = time.perf_counter()
        self._metrics.sync()
        stands = {
            "stage": stage,
            "step": step,
            "row": row or {},
            "complete": complete,
            "metrics_bytes": self._metrics.length,
            "seconds": self._seconds(),
            "finished": self.finished,
            "followed": self._followed,
            "warnings": self.warnings,
        }
        parts = {name: part.state() for name, part in (keep or {}).items()}
        state = State.of({"run": State(stands), "random": GlobalGenerators().state()} | parts)
        self._checkpoints.save("complete" if complete else f"{stage or 'between'}-{step}", state)
        self._saved = time.perf_counter()
        self._cost = self._saved - began
        self._saving += self._cost

    def _boundary(self, stage: str, step: int, row: Mapping[str, float], keep: Mapping[str, Stateful] | None) -> None:
        """Between two steps: saves if it is time, and ends if that was asked for."""
        since = time.perf_counter() - self._saved
        stop = self._stop_status() is not None
        every = self.limits.checkpoint_seconds and max(self.limits.checkpoint_seconds, 40 * self._cost)
        if keep is not None and (stop or since >= every):
            self.checkpoint(stage, step, keep, row)
        self._stop_if_asked(f"{stage} {step}")

    def _stop_status(self) -> int | None:
        if self._asked_to_stop is not None:
            return 128 + self._asked_to_stop
        out_of_time = self.limits.max_time and time.perf_counter() - self.started >= self.limits.max_time
        return 3 if out_of_time else None

    def _stop_if_asked(self, where: str = "") -> None:
        status = self._stop_status()
        if status is not None:
            why = f"the time limit of {self.limits.max_time:g} s" if status == 3 else signal.Signals(status - 128).name
            raise Stopped(f"stopped by {why}{f' after {where}' if where else ''}; go on with: {self._again()}", status)

    def _again(self) -> str:
        folder = str(self.folder)
        between = "=" if folder.startswith("-") else " "
        return f"lmgym {self._command} --resume{between}{shlex.quote(folder)}"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_to_stop is not None:
            raise KeyboardInterrupt(128 + number)
        self._asked_to_stop = signal.Signals(number)
        # Not through the console, which may be in the middle of a line.
        with suppress(OSError):
            os.write(2, b"\nlmgym: finishing this step, then saving; once more stops at once\n")

    def _go_on(self, stage: str, keep: Mapping[str, Stateful] | None) -> tuple[int, Mapping[str, float]]:
        """Gives parts of a stage back what the checkpoint holds of them; returns its next step and its last metrics."""
        if self._state is None:
            return 0, {}
        stands = self._state.part("run")
        here = stands.data["stage"] == stage
        for name, part in (keep or {}).items():
            if name in self._state.data and name not in self._given and (here or stage in self._followed):
                part.restore(self._state.part(name))
                self._given.add(name)
        if not here:
            return 0, {}
        self._arrive(self._state)
        return stands.count("step"), stands.data["row"]

    def _arrive(self, state: State) -> None:
        """From here on the run does what it would have done."""
        GlobalGenerators().restore(state.part("random"))
        self._state = None

    def _keep_reproduction(self, state: State) -> None:
        with suppress(OSError):
            write_state(self.path("bad_step"), state)
            self.say(f"what happened can be looked at in {self.path('bad_step')}")

    def _withdraw(self) -> None:
        """Leaves the folder empty where a run failed before it did anything, so that it can be tried again."""
        own = {self.path(name) for name in (*_OWN, "metrics.jsonl", "tensorboard")}
        with suppress(OSError):
            if set(self.folder.iterdir()) <= own and not self.path("metrics.jsonl").stat().st_size:
                shutil.rmtree(self.path("tensorboard"), ignore_errors=True)
                for path in own:
                    path.unlink(missing_ok=True)

    # What it writes ------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A path in the folder.

        Raises:
            ValueError: the name leads out of it.
        """
        return confined(self.folder, name)

    def write(self, name: str, data: Any) -> None:
        """Writes a JSON file."""
        atomic.write(self.path(name), _json(data))

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a JSON Lines file."""
        atomic.write(self.path(name), "".join(json.dumps(finite(row), ensure_ascii=False) + "\n" for row in rows))

    def write_folder(self, name: str, writer: Callable[[Path], object]) -> None:
        """Writes a folder, by a function that is given an empty one."""
        atomic.write_folder(self.path(name), writer)

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row of metrics; a number that is not finite is null there."""
        row = {"stage": stage, "step": step, "seconds": round(self._seconds(), 3), **metrics}
        self._metrics.append(json.dumps(finite(row), ensure_ascii=False))
        if self._board is not None:
            _draw(self._board, self.folder, stage, step, metrics)
        for tracker in self._trackers:
            tracker.log({f"{stage}/{name}": value for name, value in ({**metrics, "step": step}).items()})

    def last(self, stage: str) -> Mapping[str, float]:
        """The last row of metrics of a stage that `follow` has seen to its end."""
        return self._followed[stage]

    def warn(self, text: str) -> None:
        """Tells the user that something is probably wrong, and keeps it for the report."""
        self.warnings.append(text)
        self.write("warnings.json", self.warnings)
        self.say(f"warning: {text}")

    def _seconds(self) -> float:
        return self._before + time.perf_counter() - self.started

    def say(self, text: str) -> None:
        """Tells the user something, with the time."""
        # No markup is read in the text: it may hold the name of a folder such as "[bold]", or what a model wrote.
        line = Text.assemble((f"{time.perf_counter() - self.started:6.1f} s", "dim"), f"  {printable(text)}")
        self.console.print(line, soft_wrap=True)

    def follow(
        self,
        stage: str,
        rows: Iterator[Mapping[str, float]],
        total: int | None,
        show: Mapping[str, str],
        keep: Mapping[str, Stateful] | None = None,
        keepable: Callable[[], bool] = lambda: True,
    ) -> Iterator[Mapping[str, float]]:
        """Logs the metrics that a stage yields, shows them on a progress bar, saves checkpoints, and passes them on.

        Args:
            stage: its name.
            rows: an algorithm's `train`.
            total: how many rows there will be, where that is known.
            show: labels of the live figures, and the metrics that they show.
            keep: everything that changes from row to row, and that no file holds yet. Where a run goes on, it is put
                back before `rows` begins. Without it an interrupted stage begins again.
            keepable: whether that is enough to go on, asked after each row.

        Raises:
            Stopped: the run was asked to end, and is saved.
        """
        with self._fitting():
            first, metrics = self._go_on(stage, keep)
        if stage in self._followed:
            return
        with self._bar(stage, total, first) as advance:
            for step, metrics in enumerate(rows, start=first):
                self.log(stage, step, metrics)
                advance("  ".join(f"{label} {metrics[name]:.3g}" for label, name in show.items() if name in metrics))
                yield metrics
                self._boundary(stage, step + 1, metrics, keep if keepable() else None)
        self._followed[stage] = dict(metrics)

    @contextmanager
    def _bar(self, stage: str, total: int | None, done: int) -> Iterator[Any]:
        if not self.console.is_terminal:
            # A log file wants a line now and then, not a bar.
            def line(text: str) -> None:
                nonlocal done
                done += 1
                if done % max(1, total // 10 if total else 10) == 0 or done == total:
                    self.say(f"{stage} {done}{f'/{total}' if total else ''}  {text}")

            yield line
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
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(stage, total=total, completed=done, live="", speed="")
            began, first = time.perf_counter(), done

            def move(text: str) -> None:
                done = progress.tasks[0].completed + 1
                speed = f"{(done - first) / (time.perf_counter() - began):.1f}/s"
                progress.update(task, advance=1, live=text, speed=speed)

            yield move


def _tensorboard(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Any:
    """A writer of TensorBoard's events, where TensorBoard is installed; `rows` of metrics are written anew."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    path = folder / "tensorboard"
    shutil.rmtree(path, ignore_errors=True)
    with atomic.naming(path):
        board = SummaryWriter(str(path))
    for row in rows:
        _draw(board, folder, row["stage"], row["step"], {k: v for k, v in row.items() if k not in _PLACE})
    return board


_PLACE = ("stage", "step", "seconds")


def _draw(board: Any, folder: Path, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
    with atomic.naming(folder / "tensorboard"):  # its own thread may have met the error some rows ago
        for name, value in metrics.items():
            if value is not None:
                board.add_scalar(f"{stage}/{name}", value, step)


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        ValueError: there is none, or it is none.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{str(folder)!r} is not the folder of a run: it has no config.json ({error.strerror})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no object")
    return config


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was being written when the run ended is left out."""
    lines = read_lines(path)
    whole = path.read_bytes().endswith(b"\n")
    rows = [json.loads(line) for _, line in (lines if whole else lines[:-1])]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} is damaged: not every line of it is an object")
    return rows


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics that this program may have written."""
    place = isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    if not place or not all(v is None or isinstance(v, (int, float)) for k, v in row.items() if k != "stage"):
        raise ValueError(f"{str(row)[:60]} is no row of metrics")
    return row


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """In words, in which options two runs differ, but for those that change no result."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in sorted({*old, *new}) if name or key not in FREE]
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    return [] if old == new else [f"{name} is {old!r} there, and {new!r} here"]


def _json(data: Any) -> str:
    return json.dumps(finite(data), indent=2, ensure_ascii=False, default=str) + "\n"


def _split(command: str) -> list[str] | None:
    """A command's arguments; None where the quotes around one went with the secret that was in it."""
    try:
        return shlex.split(command)
    except ValueError:
        return None


def _holds_something(folder: Path) -> bool:
    """Whether there is more than what a run leaves that was killed before it began."""
    return any(not (path.name.startswith(".") and path.name.endswith(".partial")) for path in folder.iterdir())


def _lock(folder: Path) -> int:
    """Holds the folder for this process, until it ends however it may.

    Raises:
        ValueError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return os.open(os.devnull, os.O_RDONLY)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(held)
        raise ValueError(
            f"another process is writing to {str(folder)!r}: let it end, or choose another --out"
        ) from error
    return held


def _tracker(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"sending metrics to {name} needs another package: pip install 'lmgym[{name}]'") from error
