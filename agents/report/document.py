"""The frame of every page: one file that loads nothing and runs no script, with a header, links and sections."""

from collections.abc import Sequence
from functools import cache
from importlib import resources

from agents.report.html import Html, tag

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(
    kicker: str, title: str, facts: Sequence[Html], sections: Sequence[tuple[str, str, object]], tab: str, css: str = ""
) -> str:
    """A whole page.

    Args:
        kicker: a short line above the title.
        title: the heading.
        facts: a line below the heading.
        sections: of each the id, the heading and the body; those with an empty body are left out.
        tab: the title of the browser's tab.
        css: rules in addition to the style sheet.
    """
    sections = [section for section in sections if section[2]]
    header = tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("h1", title),
        tag("p", *facts, class_="facts"),
        tag("nav", *(tag("a", name, href=f"#{key}") for key, name, _ in sections), aria_label="Sections"),
    )
    main = tag("main", *(tag("section", tag("h2", name), body, id=key) for key, name, body in sections))
    return f"<!DOCTYPE html>\n{tag('html', _head(tab, css), tag('body', header, main), lang='en')}\n"


def _head(tab: str, css: str) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", tab),
        tag("style", Html(style_sheet() + css)),
    )


@cache
def style_sheet() -> str:
    """The pages' style sheet, style.css."""
    return resources.files("agents.report").joinpath("style.css").read_text(encoding="utf-8")
