"""Where a run's metrics go: metrics.jsonl, TensorBoard, and tracking services."""

import importlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agents.runs.files import finite, read_rows
from lmgym.io import atomic

POSITION = ("stage", "step", "seconds")
"""What a row of metrics.jsonl holds besides metrics."""


class MetricsLog:
    """Appends rows of metrics to metrics.jsonl, to TensorBoard where it is installed, and to tracking services.

    Args:
        folder: the run's folder.
        services: what `tracking_service` gave.
        options: the run's options, for the services.
        length: bytes of metrics.jsonl that count; a resumed run cuts off what follows. None: a new run.

    Raises:
        ValueError: metrics.jsonl is not what the run wrote.
        lmgym.io.atomic.WriteError: it cannot be opened.
    """

    def __init__(self, folder: Path, services: Sequence[Any], options: Mapping[str, Any], length: int | None):
        path = folder / "metrics.jsonl"
        try:
            self._file = atomic.LineWriter(path, length or 0)
            rows = [] if length is None else [_checked(row) for row in read_rows(path)]
        except ValueError as error:
            raise ValueError(
                f"{str(path)!r} is not what the run wrote there ({error}), so the run cannot be resumed: restore the "
                "file, or start again with another --out"
            ) from error
        self.folder = folder
        self._board = tensorboard_writer(folder, rows)
        self._services = services
        for service in services:
            service.init(project="lmgym", name=folder.name, config=json.loads(json.dumps(options, default=str)))

    @property
    def length(self) -> int:
        """Bytes of metrics.jsonl."""
        return self._file.length

    def append(self, stage: str, step: int, seconds: float, metrics: Mapping[str, float]) -> None:
        """Writes a row; in metrics.jsonl, a value that is not finite is null."""
        row = {"stage": stage, "step": step, "seconds": round(seconds, 3), **metrics}
        self._file.append(json.dumps(finite(row), ensure_ascii=False))
        if self._board is not None:
            _add_scalars(self._board, self.folder, stage, step, metrics)
        for service in self._services:
            service.log({f"{stage}/{name}": value for name, value in ({**metrics, "step": step}).items()})

    def sync(self) -> None:
        """Returns when all rows are on the disk."""
        self._file.sync()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()
        for service in self._services:
            service.finish()


def tracking_service(name: str) -> Any:
    """The module of a service, which has `init`, `log` and `finish`.

    Raises:
        ImportError: its package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"sending metrics to {name} needs another package: pip install 'lmgym[{name}]'") from error


def tensorboard_writer(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Any:
    """A writer of TensorBoard events that holds these rows of metrics.jsonl; None where TensorBoard is not installed.

    Events that are there already are replaced.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    path = folder / "tensorboard"
    shutil.rmtree(path, ignore_errors=True)
    with atomic.named_errors(path):
        board = SummaryWriter(str(path))
    for row in rows:
        _add_scalars(board, folder, row["stage"], row["step"], {k: v for k, v in row.items() if k not in POSITION})
    return board


def _add_scalars(board: Any, folder: Path, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
    with atomic.named_errors(
        folder / "tensorboard"
    ):  # the error may be of an earlier row: TensorBoard writes in a thread
        for name, value in metrics.items():
            if value is not None:
                board.add_scalar(f"{stage}/{name}", value, step)


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of metrics.jsonl, if this program can have written it."""
    positioned = isinstance(row.get("stage"), str) and isinstance(row.get("step"), int)
    if not positioned or not all(v is None or isinstance(v, (int, float)) for k, v in row.items() if k != "stage"):
        raise ValueError(f"{str(row)[:60]} is not a row of metrics")
    return row
