"""A strict reader of JSON Lines files. Each error names the file and the line, and says what to do."""

import gzip
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmgym.io.display import quoted

GZIP = b"\x1f\x8b"
"""The first bytes of a gzip file."""
MAX_DEPTH = 100
"""Maximum nesting depth of a row. Our data needs less, and deeper nesting could exhaust the stack."""


def read_jsonl(path: str | os.PathLike[str], required: Sequence[str] = ()) -> list[dict[str, Any]]:
    """As `json_rows`, but all rows at once, without the line numbers.

    Args:
        path: the file.
        required: fields that each row must have.
    """
    rows = []
    for number, row in json_rows(path):
        missing = [field for field in required if field not in row]
        if missing:
            raise ValueError(
                f"{os.fspath(path)}, line {number}: lacks the field {missing[0]!r}; it has {quoted(sorted(row))}. Add "
                "or rename it"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{os.fspath(path)}: no rows; write one JSON object per line")
    return rows


def json_rows(path: str | os.PathLike[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with one JSON object per line, each with its line number; empty lines are skipped.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not UTF-8, not JSON, or not an object.
    """
    for number, line in text_lines(path):
        if not line.strip():
            continue
        where = f"{os.fspath(path)}, line {number}"
        try:
            row = parse_json(line.strip(), strict=True)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON ({error}); write one JSON object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f'{where}: not an object but {type(row).__name__}; write one like {{"prompt": "..."}}')
        yield number, row


def read_lines(path: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, stripped, each with its line number, starting at 1.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not UTF-8.
    """
    return [(number, line.strip()) for number, line in text_lines(path) if line.strip()]


def text_lines(path: str | os.PathLike[str]) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their ends, each with its line number, starting at 1; gzip is decompressed.

    Only a line feed ends a line: JSON strings may contain the other characters at which `str.splitlines` splits.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is not UTF-8, or the gzip file is damaged.
    """
    name, file, number = os.fspath(path), Path(path), 0
    if not file.is_file():
        raise FileNotFoundError(f"{name}: no such file; check the path (working folder: {Path.cwd()})")
    try:
        with file.open("rb") as raw, gzip.open(raw) if raw.peek(2)[:2] == GZIP else raw as lines:
            for number, line in enumerate(lines, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}, line {number}: not UTF-8 ({error.reason}); save it as UTF-8") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name}, line {number + 1}: damaged gzip ({error}); copy or download it again") from error


def parse_json(text: str, strict: bool = False) -> Any:
    """Parses untrusted JSON.

    Args:
        text: the JSON text.
        strict: whether to reject NaN and infinities, which are not JSON; duplicate fields, of which all but one would
            be lost; and lone surrogates, which UTF-8 cannot encode.

    Raises:
        ValueError: it is not JSON, is nested deeper than `MAX_DEPTH`, or breaks a strict rule.
    """
    try:
        if not strict:
            value = json.loads(text)
        else:
            hooks: dict[str, Any] = {"parse_constant": _refuse_constant, "parse_float": _finite}
            value = json.loads(text, object_pairs_hook=_once, **hooks)
    except RecursionError as error:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from error
    if max(text.count("["), text.count("{")) > MAX_DEPTH // 2:
        _check_depth(value)
    # JSON can contain a lone surrogate only as an escape, because UTF-8 cannot encode one.
    if strict and re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("a text contains a lone surrogate, half a character, such as \\ud800") from error
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inner for v in values]
    if level:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:30]} is outside the range of floating-point numbers")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {quoted(twice)} occurs twice")
    return found
