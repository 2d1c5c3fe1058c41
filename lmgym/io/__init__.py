"""Files: atomic writes, JSON Lines, rows of data in every common form, and text that is safe to show in a terminal."""

from lmgym.io import atomic
from lmgym.io.display import encodable, printable, quoted, tolerate_characters
from lmgym.io.jsonl import parse_json, read_jsonl, read_lines
from lmgym.io.rows import Source, local_path, names_in, read_rows, source_name

__all__ = [
    "Source",
    "atomic",
    "encodable",
    "local_path",
    "names_in",
    "parse_json",
    "printable",
    "quoted",
    "read_jsonl",
    "read_lines",
    "read_rows",
    "source_name",
    "tolerate_characters",
]
