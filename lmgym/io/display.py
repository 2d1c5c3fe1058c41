"""Texts as a terminal may show them: model output is data. Imports nothing heavy."""

import re


def printable(text: str) -> str:
    """Text with every character replaced that could move the cursor, colour, hide or reorder what stands beside it.

    These are the control characters (escape, carriage return, backspace, the C1 controls from U+0080 on), marks of
    direction and other invisible ones, line and paragraph separators, and halves of characters. Line feeds and tabs
    stay.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def quoted(value: object, most: int = 200) -> str:
    """A value for a message: its `repr` in one line, and not longer than a reader wants it."""
    text = re.sub(r"\s*\n\s*", " ", repr(value))
    return text if len(text) <= most else f"{text[:most]}…"
