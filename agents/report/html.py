"""HTML that is safe by construction: every string is escaped unless it is markup that this module made."""

import html
import math
import unicodedata
from collections.abc import Iterable

import numpy as np

from agents.report.read import as_float


class Html(str):
    """Markup that may stand in the page as it is; any other string is escaped."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element. `class_` stands for the attribute class, other underscores for hyphens; None leaves one out."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{text}>"
    return Html(opening if name in ("meta", "input") else f"{opening}{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """Pieces of HTML in a row."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def escape(value: object) -> str:
    """Text as HTML, with characters that would be invisible made visible."""
    return html.escape(visible(str(value)))


def visible(text: str) -> str:
    """Shows characters that would hide, reorder or break text: U+202E, zero-width ones, NUL, lone surrogates."""
    return "".join(map(visible_character, text))


def visible_character(character: str) -> str:
    """A control or format character as a symbol or its code point."""
    # Spaces of other widths count as unprintable, but show.
    if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return f"⟨U+{ord(character):04X}⟩"


def number(value: object, digits: int = 3) -> str:
    """A number for a table; a dash where it is missing."""
    number = as_float(value)
    if number is None:
        return "–"
    is_plain = number.is_integer() or abs(number) >= 10**digits
    return minus(f"{number:.0f}" if is_plain and abs(number) < 1e6 else f"{number:#.{digits}g}")


def signed(value: object) -> str:
    """A number with its sign."""
    number = as_float(value)
    return "–" if number is None else minus(f"{number:+.3g}") if number else "0"


def minus(text: str) -> str:
    """A typographic minus instead of a hyphen."""
    return text.replace("-", "−")


def with_error(mean: float | None, stderr: float | None, percent: bool = False, sign: str = "") -> str:
    """`1.234 ± 0.021`: the error to two figures, the mean to as many decimals; to three figures without an error."""
    if mean is None:
        return "–"
    mean, unit = (100 * mean, "\N{NO-BREAK SPACE}%") if percent else (mean, "")
    if not stderr or stderr < 0:
        return ("+" if sign and mean > 0 else "") + number(mean) + unit
    stderr = stderr * 100 if percent else stderr
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    form = f"z.{decimals}f" if decimals <= 6 else ".2g"  # a row of zeros would hide the figures
    text = f"{mean:{sign}{form}} ± {stderr:{form}}"
    return minus(text.replace(" ", "\N{NO-BREAK SPACE}")) + unit


def duration(seconds: float) -> str:
    """Seconds in words that a person reads."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def note(*children: object) -> Html:
    """A paragraph of small print."""
    return tag("p", *children, class_="note")


def same(pairs: Iterable[tuple[object, object]]) -> bool:
    """Whether there are numbers, and each pair is one of them twice, but for the rounding of float32."""
    table = np.array([(as_float(a), as_float(b)) for a, b in pairs], dtype=float).reshape(-1, 2)
    table = table[np.isfinite(table).any(axis=1)]
    return bool(len(table)) and bool((np.abs(np.diff(table)) <= 1e-5 * np.abs(table).max()).all())
