"""Makes text, such as model output, safe to show in any terminal. Imports no large package."""

import re
import sys
from io import TextIOWrapper
from typing import TextIO


def printable(text: str) -> str:
    """Replaces each character that could move the cursor, or colour, hide or reorder other text.

    These are control characters (escape, carriage return, backspace, the C1 controls from U+0080), direction marks and
    other invisible characters, line and paragraph separators, and lone surrogates. Line feeds and tabs are kept.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def quoted(value: object, max_length: int = 200) -> str:
    """A value for an error message: its `repr` on one line, truncated to `max_length` characters."""
    text = re.sub(r"\s*\n\s*", " ", repr(value))
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def first_line(error: BaseException) -> str:
    """The first line of an error message; the type of the error if the message is empty."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def tolerate_characters() -> None:
    """From now on, standard output shows "?" for a character that its encoding lacks, instead of raising an error.

    For the entry point of a program: a console of Windows (cp1252), or of a container or cron (ASCII), must not end it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def encodable(text: str, stream: TextIO | None = None) -> str:
    """The text with "?" for each character that a stream (by default standard output) cannot encode."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)
