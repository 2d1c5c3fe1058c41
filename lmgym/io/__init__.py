"""Files: atomic writes, JSON Lines, rows of data in every common form, text that is safe to show; progress reports."""

from lmgym.io import atomic
from lmgym.io.display import encodable, first_line, printable, quoted, tolerate_characters
from lmgym.io.jsonl import parse_json, read_jsonl, read_lines
from lmgym.io.progress import Report, listen, report_progress
from lmgym.io.rows import Source, local_path, names_in, read_rows, source_name

__all__ = [
    "Report",
    "Source",
    "atomic",
    "encodable",
    "first_line",
    "listen",
    "local_path",
    "names_in",
    "parse_json",
    "printable",
    "quoted",
    "read_jsonl",
    "read_lines",
    "read_rows",
    "report_progress",
    "source_name",
    "tolerate_characters",
]
