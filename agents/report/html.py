"""HTML that is safe by construction: `tag` and `join` escape every string that is not `Html`."""

import html
import unicodedata


class Html(str):
    """Markup that goes into the page unchanged. Every other string is escaped."""


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element.

    Args:
        name: the element's name.
        children: `Html` is inserted unchanged, anything else as escaped text.
        attributes: `class_` is the attribute class; other underscores become hyphens; None omits the attribute.
    """
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{text}>"
    return Html(opening if name in ("meta", "input") else f"{opening}{join(*children)}</{name}>")


def join(*children: object) -> Html:
    """The children one after another; those that are not `Html` are escaped."""
    return Html("".join(child if isinstance(child, Html) else escape(child) for child in children))


def escape(value: object) -> str:
    """Text as HTML, in which invisible characters are shown."""
    return html.escape(visible(str(value)))


def visible(text: str) -> str:
    """Shows characters that would hide, reorder or break text: U+202E, zero-width ones, NUL, lone surrogates."""
    return "".join(map(visible_character, text))


def visible_character(character: str) -> str:
    """A character as it is, or the code point of a control or format character."""
    # `isprintable` is False for wide and narrow spaces, which do show.
    if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return f"⟨U+{ord(character):04X}⟩"


def small_print(*children: object) -> Html:
    """A paragraph in small type."""
    return tag("p", *children, class_="note")


def tile(name: str, figure: str, remark: str = "") -> Html:
    """One large number with its name, for a list of class "tiles"."""
    below = tag("dd", remark, class_="note") if remark else ""
    return tag("div", tag("dt", name), tag("dd", figure), below, class_="tile")
