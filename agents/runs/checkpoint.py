"""Checkpoints: where a run stands, as JSON and safetensors, whole or not there, checked before they are used.

A checkpoint is a folder with `state.json` and `tensors.safetensors`. Nothing in it is code, and nothing is pickled.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load as tensors_of
from safetensors.torch import save as bytes_of
from torch import Tensor

from agents.training.stateful import State
from lmgym.io import atomic

FORMAT = 1
"""Raised when a checkpoint written before can no longer be read."""


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


def write_state(folder: Path, state: State) -> None:
    """Writes a checkpoint's folder: afterwards all of it is there, or none.

    Raises:
        lmgym.io.atomic.WriteError: it could not be written.
    """
    held: set[int] = set()

    def alone(tensor: Tensor) -> Tensor:
        """On the host, in memory of its own: safetensors refuses parts of one another."""
        tensor = tensor.detach().cpu().contiguous()
        tensor = tensor.clone() if tensor.untyped_storage().data_ptr() in held else tensor
        held.add(tensor.untyped_storage().data_ptr())
        return tensor

    tensors = bytes_of({name: alone(t) for name, t in state.tensors.items()})
    body = {"format": FORMAT, "tensors": hashlib.sha256(tensors).hexdigest(), "data": finite(state.data)}
    text = json.dumps(body | {"checksum": _checksum(body)}, indent=1, allow_nan=False)

    def fill(aside: Path) -> None:
        atomic.write(aside / "tensors.safetensors", tensors)
        atomic.write(aside / "state.json", text)

    atomic.write_folder(folder, fill)


def read_state(folder: Path) -> State:
    """Reads a checkpoint, and checks that it is what was written.

    Raises:
        Damaged: it is not; the message is one line and names the file.
    """

    def refuse(path: Path, why: object) -> NoReturn:
        said = " ".join(str(why).split())[:200]
        raise Damaged(f"the checkpoint {str(path)!r} is damaged ({said})")

    path = folder / "state.json"
    try:
        body = json.loads(path.read_bytes())
        if not isinstance(body, dict) or not isinstance(body.get("data"), dict):
            refuse(path, "it is no checkpoint")
        if body.get("format") != FORMAT:
            refuse(path, f"its format is {body.get('format')!r}, and this version reads {FORMAT}")
        if body.pop("checksum", None) != _checksum(body):
            refuse(path, "its checksum is another")
    except Damaged:
        raise
    except (OSError, ValueError, RecursionError) as error:
        refuse(path, error)
    path = folder / "tensors.safetensors"
    try:
        raw = path.read_bytes()
        if hashlib.sha256(raw).hexdigest() != body.get("tensors"):
            refuse(path, "its checksum is another")
        return State(body["data"], tensors_of(raw))
    except (OSError, SafetensorError) as error:
        refuse(path, error)


class Checkpoints:
    """The newest checkpoints of a run.

    Args:
        folder: holds them, one folder each, numbered; made when the first is written.
        keep: how many are kept.
    """

    def __init__(self, folder: Path, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep={keep} checkpoints are too few: keep at least 1")
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """Their folders, the oldest first."""
        found = [path for path in self.folder.glob("*") if re.fullmatch(r"\d{6,}-[\w.-]+", path.name)]
        return sorted(found, key=lambda path: int(path.name.partition("-")[0]))

    def save(self, label: str, state: State) -> Path:
        """Writes one more, and removes those that are too many."""
        before = self.all()
        number = int(before[-1].name.partition("-")[0]) + 1 if before else 1
        path = self.folder / f"{number:06}-{re.sub(r'[^A-Za-z0-9_.-]', '_', label)}"
        atomic.make_folder(self.folder)  # and not what it is in: if that is gone, something is wrong
        write_state(path, state)
        for old in before[: max(0, len(before) + 1 - self.keep)]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest(self, say: Callable[[str], object]) -> State | None:
        """The newest one that is whole; None where there is none yet.

        Args:
            say: is told of those that are damaged.

        Raises:
            Damaged: all are.
        """
        found = self.all()
        for path in reversed(found):
            try:
                return read_state(path)
            except Damaged as error:
                say(f"{error}: using the one before it")
        if found:
            raise Damaged(
                f"all checkpoints in {str(self.folder)!r} are damaged, and nothing was changed: start again in another "
                "folder (--out)"
            )
        return None


def finite(value: Any) -> Any:
    """Plain data in which numbers that JSON cannot hold are null."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
