"""Reads weights from untrusted files: only safetensors, and every error names the file.

Loading a pickle can run any code, so no pickle is ever opened.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from lmgym.io import first_line, parse_json

CONVERT = "if you trust the file, convert it to safetensors: model.save_pretrained(folder) of peft or transformers"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files with pickled weights."""
RUN_MODELS = ("policy", "sft", "reward_model")
"""Folders with models in the folder of a run."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Reads a file of safetensors, on the CPU.

    Raises:
        ValueError: there is no such file, it is not a safetensors file (such as a pickle), it is damaged, or a weight
            is not finite. The message names the file; if it is missing, any pickle in the same folder.
    """
    path = Path(path)
    if not path.is_file():
        if pickled := pickles_in(path.parent):
            raise _pickled(pickled[0])
        raise ValueError(f"{path}: no such file; weights are read from safetensors files only")
    refuse_pickle(path)
    try:
        found = load_file(str(path))
    except Exception as error:  # safetensors and torch raise different errors, depending on the damage
        raise _damaged(path, error) from error
    for name, weight in found.items():
        if weight.is_floating_point() and not bool(torch.isfinite(weight.float()).all()):
            raise ValueError(
                f"{path}: {name!r} holds a weight that is not finite; the file is damaged, or its training diverged"
            )
    return found


def refuse_pickle(path: Path) -> None:
    """Refuses a pickle, or a zip archive as torch writes, under any name.

    Raises:
        ValueError: the file begins like a pickle or a zip archive.
    """
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file begins with the length of its header, 8 arbitrary bytes; then comes the header in JSON.
    if head[8:] != b"{" and head.startswith((b"\x80", b"PK\x03\x04")):
        raise ValueError(f"{path}: a pickle under another name; it could run any code and is not opened; {CONVERT}")


def check_folder(folder: str | Path) -> None:
    """Refuses a folder with pickled or damaged weights, and that of a run. Only the headers are read.

    Raises:
        ValueError: a file is pickled or damaged; the message names it. Or the folder holds models in folders of it.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    inside = [str(Path(folder) / name) for name in RUN_MODELS if (Path(folder) / name).is_dir()]
    if inside and not files:
        raise ValueError(f"it is the folder of a run: give one of the models in it, {' or '.join(inside)}")
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
    return ValueError(f"{path}: pickled weights can run any code when they are loaded, and are not opened; {CONVERT}")


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: not a safetensors file, or damaged ({first_line(error)}); copy or download the file again"
    )


def pickles_in(folder: Path) -> list[Path]:
    """The files of a folder with a suffix of pickled weights."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in PICKLES)


def check_names(path: str | Path, found: Iterable[str], expected: Iterable[str]) -> None:
    """Refuses a file with missing or unexpected weights: without an error, the model would be wrong.

    Raises:
        ValueError: names differ; the message has the file, the first name that differs, and how many do.
    """
    found, expected = set(found), set(expected)
    for names, what in ((expected - found, "lacks"), (found - expected, "has the unexpected weight")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ValueError(
                f"{path}: {what} {sorted(names)[0]!r}{more}; is it the file of another model, or of an older version?"
            )


def check_shapes(path: str | Path, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuses weights with other names or shapes than expected.

    Raises:
        ValueError: a name or shape differs; the message has the file and the first weight that differs.
    """
    check_names(path, found, expected)
    for name, weight in found.items():
        if weight.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name!r} has the shape {tuple(weight.shape)}, but the model expects "
                f"{tuple(expected[name].shape)}; was it trained on another base model?"
            )


def read_settings(path: str | Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
        ValueError: it cannot be read, is not JSON, or not an object; the message names the file.
    """
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({first_line(error)}); copy or download the file again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object but {type(value).__name__}; copy or download the file again")
    return value
