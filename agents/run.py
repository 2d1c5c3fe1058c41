"""A run's folder: what was asked for, what was measured, and progress on the console while it happens."""

import importlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from lmgym.plain import printable

PACKAGES = ("lmgym", "torch", "transformers", "peft", "gymnasium", "stable-baselines3", "numpy")


class Run:
    """Writes a run's folder: config.json, metrics.jsonl, and TensorBoard events where TensorBoard is installed.

    Args:
        folder: made if needed.
        options: everything that was asked for, as plain data; kept in config.json with versions and revision.
        console: where progress is shown.
        track: services to send the metrics to as well: "wandb", "trackio". Nothing is sent anywhere unless asked for.

    Raises:
        ValueError: the folder holds another run, or something else.
        ImportError: a service's package is not installed; it names the extra.
    """

    def __init__(
        self,
        folder: str | Path,
        options: Mapping[str, Any],
        console: Console | None = None,
        track: Sequence[str] = (),
    ):
        trackers = [_tracker(name) for name in track]
        self.folder = Path(folder)
        self.console = console or Console()
        self.started = time.perf_counter()
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            what = "holds another run" if (self.folder / "config.json").is_file() else "is not an empty folder"
            raise ValueError(
                f"{str(self.folder)!r} {what}: nothing was changed. Choose another --out, or remove it first"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(
            "config.json",
            {
                "command": shlex.join(["lmgym", *sys.argv[1:]]),
                "task": options.get("task"),
                "model": options.get("model"),
                "seed": options.get("seed"),
                "options": options,
                "versions": {"python": platform.python_version()} | versions(),
                "revision": revision(),
                "hardware": hardware(),
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
        self._metrics = (self.folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = _tensorboard(self.folder)
        self._trackers = trackers
        for tracker in trackers:
            tracker.init(project="lmgym", name=self.folder.name, config=json.loads(json.dumps(options, default=str)))

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self._metrics.close()
        if self._board is not None:
            self._board.close()
        for tracker in self._trackers:
            tracker.finish()
        if failure is not None:
            self._withdraw()

    def _withdraw(self) -> None:
        """Leaves the folder empty where a run failed before it did anything, so that it can be tried again."""
        own = {self.path(name) for name in ("config.json", "metrics.json", "metrics.jsonl", "tensorboard")}
        if set(self.folder.iterdir()) <= own and not self.path("metrics.jsonl").stat().st_size:
            shutil.rmtree(self.path("tensorboard"), ignore_errors=True)
            for path in own:
                path.unlink(missing_ok=True)

    def path(self, name: str) -> Path:
        """A path in the folder."""
        return self.folder / name

    def write(self, name: str, data: Any) -> None:
        """Writes a JSON file."""
        self.path(name).write_text(json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes a JSON Lines file."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.path(name).write_text(text, encoding="utf-8")

    def log(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a row of metrics."""
        row = {"stage": stage, "step": step, "seconds": round(time.perf_counter() - self.started, 3), **metrics}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
        for tracker in self._trackers:
            tracker.log({f"{stage}/{name}": value for name, value in ({**metrics, "step": step}).items()})

    def say(self, text: str) -> None:
        """Tells the user something, with the time."""
        # No markup is read in the text: it may hold the name of a folder such as "[bold]", or what a model wrote.
        line = Text.assemble((f"{time.perf_counter() - self.started:6.1f} s", "dim"), f"  {printable(text)}")
        self.console.print(line, soft_wrap=True)

    def follow(
        self, stage: str, rows: Iterator[Mapping[str, float]], total: int | None, show: Mapping[str, str]
    ) -> Iterator[Mapping[str, float]]:
        """Logs the metrics that a stage yields, shows them on a progress bar, and passes them on.

        Args:
            stage: its name.
            rows: an algorithm's `train`.
            total: how many rows there will be, where that is known.
            show: labels of the live figures, and the metrics that they show.
        """
        with self._bar(stage, total) as advance:
            for step, metrics in enumerate(rows):
                self.log(stage, step, metrics)
                advance("  ".join(f"{label} {metrics[name]:.3g}" for label, name in show.items() if name in metrics))
                yield metrics

    @contextmanager
    def _bar(self, stage: str, total: int | None) -> Iterator[Any]:
        if not self.console.is_terminal:
            # A log file wants a line now and then, not a bar.
            done = 0

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
            task = progress.add_task(stage, total=total, live="", speed="")
            began = time.perf_counter()

            def move(text: str) -> None:
                done = progress.tasks[0].completed + 1
                speed = f"{done / (time.perf_counter() - began):.1f}/s"
                progress.update(task, advance=1, live=text, speed=speed)

            yield move


def versions() -> dict[str, str]:
    """The installed versions of what results depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def revision() -> str:
    """The git revision of the code, with a mark where it has been changed since; "unknown" outside a checkout."""
    root = Path(__file__).resolve().parent.parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


def hardware() -> str:
    """The machine in words: GPU where there is one, processor, threads."""
    cores = f"{_processor()}, torch threads: {torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name()}, {cores}" if torch.cuda.is_available() else cores


def peak_memory() -> str:
    """The most memory that this process has held, in words."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"peak memory on the GPU: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB"
    try:
        import resource
    except ImportError:  # not on Windows
        return "peak memory: unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MB"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"{name or platform.processor() or platform.machine()} ({platform.machine()}, {os.cpu_count()} cores)"


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def _tracker(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"sending metrics to {name} needs another package: pip install 'lmgym[{name}]'") from error
