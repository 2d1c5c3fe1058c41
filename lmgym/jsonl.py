"""A strict reader of JSON Lines files: every complaint names the file, the line and what to do."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_jsonl(path: str | os.PathLike[str], required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of `read_numbered`, without their line numbers."""
    return [row for _, row in read_numbered(path, required)]


def read_numbered(path: str | os.PathLike[str], required: Sequence[str] = ()) -> list[tuple[int, dict[str, Any]]]:
    """Reads a file with one JSON object a line, each with its line number; empty lines are skipped.

    Args:
        path: the file, in UTF-8.
        required: fields that each row must have.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8, not JSON, not an object or lacks a field, or there is no row at all.
    """
    rows = []
    for number, line in read_lines(path):
        where = f"{os.fspath(path)}, line {number}"
        try:
            row = json.loads(line, parse_constant=_refuse_constant)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); write one JSON object a line") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: not an object but {type(row).__name__}; write one like {{"prompt": "..."}}')
        missing = [field for field in required if field not in row]
        if missing:
            raise ValueError(f"{where}: lacks the field {missing[0]!r}; it has {sorted(row)}. Add or rename it")
        rows.append((number, row))
    if not rows:
        raise ValueError(f"{os.fspath(path)}: no rows; write one JSON object a line")
    return rows


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, each with its number, counted from 1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not UTF-8.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file; check the path (working folder: {Path.cwd()})")
    lines = []
    # Split bytes at \n alone: str.splitlines would also break at characters that JSON strings may hold.
    for number, raw in enumerate(file.read_bytes().split(b"\n"), start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{os.fspath(path)}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8"
            ) from error
        if line:
            lines.append((number, line))
    return lines


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
