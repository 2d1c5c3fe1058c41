"""Files: atomic writes, JSON Lines, and text that is safe to show in a terminal."""

from lmgym.io import atomic
from lmgym.io.display import encodable, printable, quoted, tolerate_characters
from lmgym.io.jsonl import parse_json, read_jsonl, read_lines, read_numbered

__all__ = [
    "atomic",
    "encodable",
    "parse_json",
    "printable",
    "quoted",
    "read_jsonl",
    "read_lines",
    "read_numbered",
    "tolerate_characters",
]
