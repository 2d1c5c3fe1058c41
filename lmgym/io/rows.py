"""Rows of named fields from where people keep data: files, saved data sets, and the Hugging Face hub.

Each row comes with its place, such as "FILE, line 3", so that errors can name it. Rows are read one after the other; a
file is never held as a whole, except one JSON list.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmgym.io.display import first_line, quoted
from lmgym.io.jsonl import json_rows, parse_json, read_lines, text_lines

Rows = Iterator[tuple[str, dict[str, Any]]]
"""Pairs of a place, such as "FILE, line 3", and a row."""

Source = str | os.PathLike[str] | Iterable[Any]
"""Where rows come from: a file, a folder, the name of a data set, or the rows themselves."""

BATCH = 1000
"""Rows that are taken out of an Arrow table together."""
LARGEST_CELL = 2**31 - 1
"""Characters in one value of a CSV file: Python's own limit of 131,072 is too low for texts."""
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_rows(source: Source, fields: Mapping[str, str] | None = None) -> Rows:
    """Reads rows of named fields.

    Args:
        source: a file (.jsonl, .json, .csv, .tsv, .txt, each also with .gz, or .parquet), a folder saved by
            `datasets.save_to_disk` or with such files, or OWNER/NAME, a data set on the Hugging Face hub. A folder or
            a name may be followed by ":CONFIG", ":CONFIG:SPLIT" or "::SPLIT"; the split is "train" by default. The hub
            is asked only if nothing on this machine has that name, and the name is not like a file's. Or the rows
            themselves: a data set of the `datasets` library, or any other iterable of mappings.
        fields: other names for fields, such as {"question": "prompt"}; see `renamed`.

    Raises:
        FileNotFoundError: there is no such file, and it is not a name on the hub.
        ImportError: an optional package is needed; it says which.
        ValueError: the source cannot be read, or has no rows. The message names the file and the line or row.
    """
    name, found = source_name(source), False
    rows = _rows_of(name) if isinstance(source, str | os.PathLike) else number_rows(_one_split(source, "", name), name)
    for place, row in rows:
        found = True
        yield place, renamed(row, fields, place) if fields else row
    if not found:
        raise ValueError(f"{name}: no rows; give at least one")


def source_name(source: Source) -> str:
    """The name of a source of rows, for messages."""
    return os.fspath(source) if isinstance(source, str | os.PathLike) else "dataset"


def number_rows(rows: Iterable[Any], name: str) -> Rows:
    """Rows of any iterable, each with its place: its number, starting at 1.

    Raises:
        ValueError: a row is not a mapping.
    """
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise ValueError(
                f"{name}, row {number}: not a mapping but {type(row).__name__}; give rows with named fields"
            )
        yield f"{name}, row {number}", dict(row)


def renamed(row: Mapping[str, Any], fields: Mapping[str, str], place: str) -> dict[str, Any]:
    """The row with further names for its fields.

    Args:
        row: the row.
        fields: new names by old ones: {"question": "prompt"}. "instruction+input" joins the texts of several fields by
            an empty line; of these, some may be missing or empty.
        place: where the row is, for errors.

    Raises:
        ValueError: the row lacks a field, or a field to be joined is not a text.
    """
    added = {}
    for old, new in fields.items():
        parts = old.split("+")
        values = [row[part] for part in parts if row.get(part) is not None]
        if not values:
            raise ValueError(f"{place}: no field {old!r} to use as {new!r}; {names_in(row)}")
        if len(parts) > 1 and not all(isinstance(value, str) for value in values):
            raise ValueError(f"{place}: {old!r} joins texts, but one of them is {quoted(values, 100)}")
        added[new] = values[0] if len(parts) == 1 else "\n\n".join(value for value in values if value.strip())
    return {**row, **added}


def names_in(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, for an error."""
    return f"the row has the fields {quoted(list(row))}" if row else "the row has no fields"


def local_path(source: str) -> Path | None:
    """The file or folder that a source names; None if this machine does not have it."""
    head = _split_name(source)[0]
    return Path(head) if os.path.exists(head) else None


def _split_name(source: str) -> tuple[str, str, str]:
    """A file, folder or name, its config and its split; those that are not given are empty."""
    if os.path.exists(source):  # a file or folder may have a colon in its name
        return source, "", ""
    head, config, split = (*source.split(":", 2), "", "")[:3]
    return head, config, split


def _rows_of(name: str) -> Rows:
    head, config, split = _split_name(name)
    if os.path.isfile(head):
        if head != name:
            raise ValueError(f"{name}: {head} is a file, which has no configs or splits; give its name alone")
        return _file_rows(Path(head))
    if not os.path.isdir(head) and not _may_be_on_hub(head):
        hint = "" if set("/.\\") & set(head) else "; a data set on the hub is named OWNER/NAME"
        raise FileNotFoundError(f"{name}: no such file; check the path (working folder: {Path.cwd()}){hint}")
    return _data_set_rows(name, head, config, split)


def _may_be_on_hub(name: str) -> bool:
    """Whether a name that nothing on this machine has can be that of a data set: not if it is like a file's."""
    return bool(_HUB_NAME.fullmatch(name)) and not _kind(name) and not os.path.exists(name.partition("/")[0])


# Files -------------------------------------------------------------------------------------------------------------


def _kind(name: str) -> str:
    """The ending that says what kind of data a file holds; empty if none does."""
    ending = Path(name.lower().removesuffix(".gz")).suffix
    return ending if ending in _READERS else ""


def _file_rows(path: Path) -> Rows:
    reader = _READERS.get(_kind(path.name))
    if reader is None:
        raise ValueError(
            f"{path}: data of an unknown kind; give a file whose name ends in {', '.join(_READERS)} (all but .parquet "
            "also with .gz)"
        )
    return reader(path)


def _json_lines(path: Path) -> Rows:
    for number, row in json_rows(path):
        yield f"{path}, line {number}", row


def _json(path: Path) -> Rows:
    """A list of objects; or one object per line, for many tools write that under this name."""
    text = "".join(line for _, line in text_lines(path))
    if not text.lstrip().startswith("["):
        yield from _json_lines(path)
        return
    try:
        rows = parse_json(text, strict=True)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); give a list of objects, or one object per line") from error
    yield from number_rows(rows, str(path))


def _text(path: Path) -> Rows:
    for number, line in read_lines(path):
        yield f"{path}, line {number}", {"prompt": line}


def _table(path: Path) -> Rows:
    """Comma- or tab-separated values, whose first line names the columns (RFC 4180)."""
    lines = text_lines(path)
    delimiter = "\t" if _kind(path.name) == ".tsv" else ","
    reader = csv.reader((line for _, line in lines), strict=True, delimiter=delimiter)
    header: list[str] | None = None
    limit = csv.field_size_limit(LARGEST_CELL)
    first = 1
    try:
        for values in reader:
            place, first = f"{path}, line {first}", reader.line_num + 1
            if not values:
                continue
            if header is None:
                header = values
                if len(set(header)) < len(header):
                    raise ValueError(f"{place}: two columns have the same name: {quoted(header)}")
            elif len(values) != len(header):
                raise ValueError(
                    f"{place}: {len(values)} values for the {len(header)} columns {quoted(header)}; put values that "
                    "contain a separator into double quotes"
                )
            else:
                yield place, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {first}: malformed ({error}); check the double quotes") from error
    finally:
        csv.field_size_limit(limit)


def _parquet(path: Path) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(f"{path}: Parquet needs another package: pip install 'lmgym[datasets]'") from error
    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(BATCH) for row in batch.to_pylist())
            yield from number_rows(rows, str(path))
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a whole Parquet file ({first_line(error)})") from error


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _text,
    ".parquet": _parquet,
}


# Data sets ---------------------------------------------------------------------------------------------------------


def _data_set_rows(name: str, source: str, config: str, split: str) -> Rows:
    """The rows of a saved data set, of a folder with data files, or of a data set on the hub."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{name}: a data set needs another package: pip install 'lmgym[datasets]'") from error
    saved = any((Path(source) / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if saved and config:
        raise ValueError(f"{name}: a saved data set has no configs; give {source}::SPLIT, or the folder alone")
    try:
        found: Any = (
            datasets.load_from_disk(source)
            if saved
            else datasets.load_dataset(source, config or None, split=split or None)
        )
    except Exception as error:  # that library raises a dozen kinds, those of the network among them
        kind = "data set" if os.path.exists(source) else "data set on the Hugging Face hub"
        raise ValueError(f"{name}: this {kind} cannot be loaded ({first_line(error)})") from error
    chosen = _one_split(found, split, name)
    batches = chosen.with_format("arrow").iter(BATCH)
    return number_rows((row for batch in batches for row in batch.to_pylist()), name)


def _one_split(found: Any, split: str, name: str) -> Any:
    """One split of a data set that has several; a data set without splits as it is."""
    if not isinstance(found, Mapping):
        return found
    wanted = split or ("train" if len(found) != 1 else next(iter(found)))
    if wanted not in found:
        raise ValueError(
            f"{name}: no split {wanted!r}; it has {quoted(list(found))}. Give NAME:CONFIG:SPLIT or ::SPLIT"
        )
    return found[wanted]
