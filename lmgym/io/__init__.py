"""Files: atomic writes, JSON Lines, text that is safe to show in a terminal; progress reports."""

from lmgym.io import atomic
from lmgym.io.display import printable, quoted
from lmgym.io.jsonl import parse_json, read_jsonl, read_lines, read_numbered
from lmgym.io.progress import Report, listen, report_progress

__all__ = [
    "Report",
    "atomic",
    "listen",
    "parse_json",
    "printable",
    "quoted",
    "read_jsonl",
    "read_lines",
    "read_numbered",
    "report_progress",
]
