"""The files of a run's folder: config.json, metrics.jsonl, and plain data as JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmgym.io import read_lines

FORMAT = 2
"""The "format" of config.json: layout of the folder, names of metrics, contents of checkpoints. Raised whenever a
folder that was written before can no longer be resumed. Runs without the key have format 1."""


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        ValueError: it is missing or damaged, it belongs to a model, or another version of lmgym wrote it.
    """
    path = folder / "config.json"
    run = folder.absolute().parent
    hint = f": give the run that it belongs to, {str(run)!r}" if _is_run(run) else ""
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(
            f"{str(folder)!r} is not the folder of a run: it has no config.json ({error.strerror}){hint}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} is damaged: it does not hold an object")
    if "model_type" in config and "format" not in config:
        hint = hint or ": give a folder that lmgym train or lmgym sft wrote, or name the model by --model"
        raise ValueError(f"{str(folder)!r} is the folder of a model, not of a run{hint}")
    check_format(config, folder)
    return config


def _is_run(folder: Path) -> bool:
    """Whether a folder looks like that of a run."""
    try:
        return "format" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def check_format(config: Mapping[str, Any], folder: Path) -> None:
    """Refuses a run of another version.

    Raises:
        ValueError: its format is not `FORMAT`.
    """
    found = config.get("format", 1)
    if found != FORMAT:
        raise ValueError(
            f"{str(folder)!r} holds another run, which another version of lmgym wrote (format {str(found)[:20]}; this "
            f"version reads format {FORMAT}): choose another folder, or use the version that wrote it"
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that was only partly written when the run was killed.

    Raises:
        ValueError: a line is not a JSON object.
    """
    lines = read_lines(path)
    complete = path.read_bytes().endswith(b"\n")
    rows = [json.loads(line) for _, line in (lines if complete else lines[:-1])]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} is damaged: not every line is an object")
    return rows


def finite(value: Any) -> Any:
    """Plain data, in which floats that are not finite are None: JSON cannot hold them."""
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(data: Any) -> str:
    """Data as the text of a JSON file; what JSON does not know is written as `str`."""
    return json.dumps(finite(data), indent=2, ensure_ascii=False, default=str) + "\n"
