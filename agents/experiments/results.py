"""Files of results: one row for each cell, appended when the cell ends, as JSON Lines."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from agents.experiments.cells import Cell, canonical
from lmgym.io import atomic, parse_json

Row = dict[str, Any]
"""The fields of a `Cell`, its key and seed, its status and result, and where and how long it ran."""
Status = Literal["ok", "error", "died", "timeout"]
"""How a cell ended: with a result; by an exception; its process died; its time was up."""


class ResultFile:
    """The file to which one process appends rows. A last line that a kill left unfinished is cut off.

    Args:
        path: the file; it is created if needed.

    Raises:
        lmgym.io.atomic.WriteError: it cannot be written.
    """

    def __init__(self, path: Path):
        whole = len(_whole_lines(path)) if path.exists() else None
        self._file = atomic.LineWriter(path, whole)

    def append(self, row: Row) -> None:
        """Appends a row, and returns when it is on the disk.

        Raises:
            lmgym.io.atomic.WriteError: it cannot be written; the rows before it are unchanged.
        """
        self._file.append(canonical(row))
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def read_results(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[Row]:
    """The rows of files, and of the `.jsonl` files of folders: one for each cell.

    If a cell failed and was run again, the row with a result counts, or else the last one. A last line that a kill left
    unfinished is ignored.

    Raises:
        ValueError: there is no such file, a row is damaged, or a cell has two results.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    found: dict[str, tuple[str, Row]] = {}
    for path in _files(map(Path, given)):
        for number, line in enumerate(_whole_lines(path).split(b"\n")[:-1], start=1):
            where = f"{path}, line {number}"
            row = _parse(line, where)
            before_where, before = found.get(row["key"], ("", None))
            if before is None or before["status"] != "ok":
                found[row["key"]] = where, row
            elif row["status"] == "ok":
                raise ValueError(
                    f"{where}: a second result of the same cell ({Cell.from_data(row).name}); the first is in "
                    f"{before_where}. Remove one of the two lines, or name each file only once"
                )
    return [row for _, row in found.values()]


def merge_results(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> list[Row]:
    """Writes the rows of several files or folders into one file, sorted by study, task, agent, index and key.

    Returns:
        The rows.

    Raises:
        ValueError: as `read_results`; or the file is in one of the folders, where its rows would be second results.
        lmgym.io.atomic.WriteError: the file cannot be written.
    """
    if Path(out).resolve().parent in [Path(path).resolve() for path in paths]:
        raise ValueError(
            f"{os.fspath(out)!r} is in a folder that is merged, and would double its rows: write elsewhere"
        )
    rows = sorted(read_results(paths), key=lambda row: [row[k] for k in ("study", "task", "agent", "index", "key")])
    atomic.write(out, "".join(f"{canonical(row)}\n" for row in rows))
    return rows


def _files(paths: Iterable[Path]) -> list[Path]:
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not path.exists() or not inside:
            raise ValueError(f"{str(path)!r}: {'no .jsonl files in this folder' if path.exists() else 'no such file'}")
        files += inside
    return files


def _whole_lines(path: Path) -> bytes:
    """The content up to the last end of a line."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r}: {error.strerror}") from error
    return data[: data.rfind(b"\n") + 1]


def _parse(line: bytes, where: str) -> Row:
    try:
        row = parse_json(line.decode(), strict=True)
        if not isinstance(row, dict):
            raise ValueError(f"not an object but {type(row).__name__}")
        cell = Cell.from_data(row)
        if row.get("key") != cell.key:
            raise ValueError(f"its key is {row.get('key')!r}, but its fields give {cell.key!r}: they were changed")
        if row.get("status") not in get_args(Status):
            raise ValueError(f"its status is {row.get('status')!r}, and must be one of {', '.join(get_args(Status))}")
        if row["status"] == "ok" and not isinstance(row.get("result"), dict):
            raise ValueError("its status is 'ok', but it has no result")
    except ValueError as error:
        raise ValueError(f"{where}: no row of results: {error}. Remove the line, and run its cell again") from error
    return row
