"""Weights from files of other people: safetensors alone, and every file that is damaged is named.

A pickle can run any code when it is opened, so none is ever opened here.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lmgym.io import parse_json

CONVERT = (
    "save it anew as safetensors where you trust the file: model.save_pretrained(folder) of peft or transformers does"
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files whose weights are pickled."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a file of safetensors, on the CPU.

    Raises:
        ValueError: there is no such file, it holds something else (a pickle), it is damaged, or a weight is no number;
            the message names the file, and any pickle that lies there in its stead.
    """
    path = Path(path)
    if not path.is_file():
        if pickled := pickles_in(path.parent):
            raise _pickled(pickled[0])
        raise ValueError(f"{path}: no such file; weights are read from safetensors alone")
    refuse_pickle(path)
    try:
        found = load_file(str(path))
    except Exception as error:  # safetensors has an error of its own, torch others for odd types and sizes
        raise _damaged(path, error) from error
    for name, weight in found.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight.float()).all()):
            raise ValueError(
                f"{path}: {name!r} holds a weight that is no finite number; the file is damaged or diverged"
            )
    return found


def refuse_pickle(path: Path) -> None:
    """Refuses a pickle, or a zip archive such as torch writes, under any name.

    Raises:
        ValueError: the file begins like one.
    """
    with path.open("rb") as file:
        head = file.read(9)
    # The length of its header comes first in safetensors, and may begin with any byte; then the header, an object.
    if head[8:] != b"{" and head.startswith((b"\x80", b"PK\x03\x04")):
        raise ValueError(f"{path}: a pickle under another name, which could run any code and is not opened; {CONVERT}")


def check_folder(folder: str | Path) -> None:
    """Refuses a folder whose weights are pickled or damaged, before anybody reads them; looks at the headers alone.

    Raises:
        ValueError: it names the file.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    pickled = pickles_in(Path(folder))
    if pickled and not files:
        raise _pickled(pickled[0])
    for path in files:
        refuse_pickle(path)
        try:
            with safe_open(str(path), "pt"):
                pass
        except Exception as error:
            raise _damaged(path, error) from error


def _pickled(path: Path) -> ValueError:
    return ValueError(f"{path}: pickled weights can run any code when they are read, and are not opened; {CONVERT}")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: no safetensors, or damaged ({first_line(error)}); copy or download the file again")


def pickles_in(folder: Path) -> list[Path]:
    """The files of a folder whose names say that they are pickled weights."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLES)


def check_names(path: str | Path, found: Iterable[str], wanted: Iterable[str]) -> None:
    """Refuses weights that lack one that is wanted, or hold one that is not: a silent gap is a wrong model.

    Raises:
        ValueError: it names the file, the first such weight, and how many there are.
    """
    found, wanted = set(found), set(wanted)
    for names, what in ((wanted - found, "lacks"), (found - wanted, "holds, besides what belongs there,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{path}: {what} {sorted(names)[0]!r}{more}; is it the file of another model, or of an older one?"
            )


def check_shapes(path: str | Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Refuses weights of other names or shapes than are wanted.

    Raises:
        ValueError: it names the file and the first weight that differs.
    """
    check_names(path, found, wanted)
    for name, weight in found.items():
        if weight.shape != wanted[name].shape:
            raise ValueError(
                f"{path}: {name!r} has the shape {tuple(weight.shape)}, and the model wants "
                f"{tuple(wanted[name].shape)}; was it trained on another base model?"
            )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file with one object.

    Raises:
        ValueError: it cannot be read, is no JSON, or no object; it names the file.
    """
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({first_line(error)}); copy or download the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object but {type(value).__name__}; copy or download the file again")
    return value


def first_line(error: BaseException) -> str:
    """An error of another library in one line; its type alone where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
