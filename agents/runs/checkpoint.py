"""Checkpoints: the state of a run as JSON and safetensors, written completely or not at all, and checked when read.

A checkpoint is a folder with `state.json` and `tensors.safetensors`. Nothing in it is code, and nothing is pickled.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from agents.runs.files import finite
from agents.training import State
from lmgym.io import atomic

FORMAT = 1
"""Of the two files. Raised whenever a checkpoint that was written before can no longer be read."""


class Damaged(ValueError):
    """A checkpoint that differs from what was written."""


def write_state(folder: Path, state: State) -> None:
    """Writes a checkpoint's folder, completely or not at all.

    Raises:
        lmgym.io.atomic.WriteError: it could not be written.
    """
    seen: set[int] = set()

    def own_copy(tensor: Tensor) -> Tensor:
        """On the host, in memory of its own: safetensors refuses tensors that share memory."""
        tensor = tensor.detach().cpu().contiguous()
        tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
        return tensor

    tensors = bytes_of({name: own_copy(t) for name, t in state.tensors.items()})
    body = {"format": FORMAT, "tensors": hashlib.sha256(tensors).hexdigest(), "data": finite(state.data)}
    text = json.dumps(body | {"checksum": _checksum(body)}, indent=1, allow_nan=False)

    def write_files(aside: Path) -> None:
        atomic.write(aside / "tensors.safetensors", tensors)
        atomic.write(aside / "state.json", text)

    atomic.write_folder(folder, write_files)


def read_state(folder: Path) -> State:
    """Reads a checkpoint, and checks that it is what was written.

    Raises:
        Damaged: it differs; the message is one line and names the file.
    """

    def refuse(path: Path, reason: object) -> NoReturn:
        raise Damaged(f"the checkpoint {str(path)!r} is damaged ({' '.join(str(reason).split())[:200]})")

    path = folder / "state.json"
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict) or not isinstance(body.get("data"), dict):
            refuse(path, "it is not a checkpoint")
        if body.get("format") != FORMAT:
            refuse(path, f"its format is {body.get('format')!r}, and this version reads {FORMAT}")
        if body.pop("checksum", None) != _checksum(body):
            refuse(path, "its checksum is wrong")
    except Damaged:
        raise
    except (OSError, ValueError, RecursionError) as error:
        refuse(path, error)
    path = folder / "tensors.safetensors"
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != body.get("tensors"):
            refuse(path, "its checksum is wrong")
        return State(body["data"], tensors_of(raw))
    except (OSError, SafetensorError) as error:
        refuse(path, error)


class Checkpoints:
    """The newest checkpoints of a run.

    Args:
        folder: holds them, one numbered folder each; made when the first is written.
        number: how many to keep; older ones are removed.

    Attributes:
        newest_path: the folder of the checkpoint that `newest` gave.
    """

    def __init__(self, folder: Path, number: int = 2):
        if number < 1:
            raise ValueError(f"number={number} checkpoints are too few: keep at least 1")
        self.folder = folder
        self.number = number
        self.newest_path: Path | None = None

    def all(self) -> list[Path]:
        """Their folders, oldest first."""
        found = [path for path in self.folder.glob("*") if re.fullmatch(r"\d{6,}-[\w.-]+", path.name)]
        return sorted(found, key=lambda path: int(path.name.partition("-")[0]))

    def save(self, label: str, state: State) -> Path:
        """Writes a checkpoint, and removes the oldest ones."""
        before = self.all()
        serial = int(before[-1].name.partition("-")[0]) + 1 if before else 1
        path = self.folder / f"{serial:06}-{re.sub(r'[^A-Za-z0-9_.-]', '_', label)}"
        atomic.make_folder(self.folder)  # not its parents: if the run's folder is gone, something is wrong
        write_state(path, state)
        for old in before[: max(0, len(before) + 1 - self.number)]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest(self, say: Callable[[str], object]) -> State | None:
        """The newest checkpoint that is not damaged; None if there is none yet.

        Args:
            say: reports those that are damaged.

        Raises:
            Damaged: all are damaged.
        """
        found = self.all()
        for path in reversed(found):
            try:
                state = read_state(path)
                self.newest_path = path
                return state
            except Damaged as error:
                say(f"{error}: using the one before it")
        if found:
            raise Damaged(
                f"all checkpoints in {str(self.folder)!r} are damaged; nothing was changed. Start again in another "
                "folder (--out)"
            )
        return None


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
