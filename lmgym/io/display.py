"""Makes untrusted text, such as model output, safe to show in a terminal. Imports no large package."""

import re


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
