"""Makes the slides of the lab and of the five sessions from the lessons' pages and docs/teaching.md.

    python docs/lessons/slides.py [FOLDER]     # HTML, and PDF where Chromium is found; FOLDER: build/slides

It needs the extra `docs`. A browser shows a file's slides one below the other: PageDown and the arrow keys go on.
"""

import base64
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from agents.lessons import all_exercises

FOLDER = Path(__file__).resolve().parent
TEACHING = FOLDER.parent / "teaching.md"
MOST_WEIGHT, MOST_LINES = 95, 20
"""How much text a slide has, in words, and how many lines of code."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
MATH = re.compile(r"\$\$(.+?)\$\$|\$(?!\s)([^$\n]+?)(?<!\s)\$", re.S)
KEYS = """addEventListener("keydown", (event) => {
  const way = { ArrowRight: 1, ArrowDown: 1, " ": 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (way) { event.preventDefault(); scrollBy({ top: way * innerHeight }); }
});"""


def section(page: str, title: str) -> str:
    """What is under a heading of the second level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", page, re.M | re.S)
    if found is None:
        raise ValueError(f"there is no section {title!r}")
    return found[1].strip()


def paragraphs(text: str) -> list[str]:
    """The paragraphs, list items, equations and code blocks of a text."""
    found = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)
    parts = [[part] if i % 2 else re.split(r"\n\s*\n|\n(?=(?:- |\d+\. ))", part) for i, part in enumerate(found)]
    items: list[str] = []
    for one in (one.strip("\n") for part in parts for one in part if one.strip()):
        if items and one.startswith("$$"):  # an equation stays with the sentence before it
            items[-1] += f"\n\n{one}"
        else:
            items.append(one)
    return items


def weight(paragraph: str) -> int:
    """About how much room a paragraph takes, in words."""
    return len(MATH.sub(" x ", paragraph).split()) + 22 * paragraph.count("$$") // 2 + 4


def in_slides(heading: str, items: Sequence[str]) -> Iterator[str]:
    """Paragraphs as slides with the same heading, none of them too full."""
    held: list[str] = []
    for item in items:
        if held and sum(map(weight, held)) + weight(item) > MOST_WEIGHT:
            yield joined(heading, held)
            held = []
        held.append(item)
    if held:
        yield joined(heading, held)


def joined(heading: str, items: Sequence[str]) -> str:
    """A slide as Markdown; items of a list stay one list."""
    text = f"## {heading}\n"
    for before, item in zip(["", *items], items, strict=False):
        both = all(re.match(r"- |\d+\. ", one) for one in (before, item))
        text += ("\n" if both else "\n\n") + item
    return text + "\n"


def code_slides(heading: str, items: Sequence[str]) -> Iterator[str]:
    """Code in pieces that fit, each below the text before it."""
    text: list[str] = []
    for item in items:
        if not item.startswith("```"):
            text.append(item)
            continue
        kind, *lines = item.splitlines()[:-1]
        while lines:
            stop = len(lines)
            if stop > MOST_LINES:
                blank = [i for i in range(8, MOST_LINES) if not lines[i].strip()]
                stop = blank[-1] if blank else MOST_LINES
            piece, lines = lines[:stop], lines[stop:]
            while lines and not lines[0].strip():
                lines = lines[1:]
            yield from in_slides(heading, text[:-1])
            code = "\n".join([kind.split()[0], *piece, "```"])
            yield joined(heading, [*text[-1:], code])
            text = []
    yield from in_slides(heading, text)


def lesson_slides(number: int, whole: bool = True) -> Iterator[str]:
    """A lesson as slides in Markdown.

    Args:
        number: of the lesson.
        whole: with its code, its questions and its exercises.
    """
    page = (FOLDER / f"lesson_{number:02}.md").read_text(encoding="utf-8")
    title = re.search(r"^# (.+)$", page, re.M)
    goal = re.search(r"\*\*Goal\.\*\* (.+?)(?=\n\n|\s+Time:)", page, re.S)
    picture = re.search(r"^!\[([^]]*)\]\(([^)]+)\)$", page, re.M)
    assert title is not None
    assert goal is not None
    assert picture is not None
    yield f"# {title[1]}\n\n{goal[1]}\n"
    yield from in_slides("Theory", paragraphs(section(page, "Theory")))
    before, after = section(page, "Code").split(picture[0])
    if whole:
        yield from code_slides("Code", paragraphs(before))
    yield joined("What comes out", [picture[0]])
    if whole:
        yield from code_slides("What it shows", paragraphs(after))
    yield from in_slides("Change this and see", paragraphs(section(page, "Change this and see")))
    if whole:
        questions, answers = section(page, "Questions").split("**Answers.**")
        yield from in_slides("Questions", paragraphs(questions))
        yield from in_slides("Answers", re.split(r"\s(?=[23]\. )", " ".join(answers.split())))


def rows(title: str) -> list[list[str]]:
    """The rows of the first table in a section of docs/teaching.md."""
    table = re.findall(r"^\| (.+) \|$", section(TEACHING.read_text(encoding="utf-8"), title), re.M)
    return [row.split(" | ") for row in table[1:]]


def exercise_slides(heading: str, numbers: str) -> Iterator[str]:
    """Some exercises with their titles: "2.1, 2.3", "3.2 to 3.5", or "the rest of 7 to 9"."""
    titles = {e.number: e.title for e in all_exercises()}
    listed = []
    for first, last in re.findall(r"(\d+\.\d+)(?: to (\d+\.\d+))?", numbers):
        lesson, begin = first.split(".")
        end = int(last.partition(".")[2] or begin)
        listed += [f"{lesson}.{i}" for i in range(int(begin), end + 1)]
    items = [f"- {number} {titles[number]}" for number in listed] or [f"- {numbers}"]
    yield from in_slides(
        heading, [*items, "`lmgym exercise show` writes the start, and `lmgym exercise check` grades."]
    )


def lab() -> Iterator[str]:
    """The slides of the lab."""
    plan = rows("A lab of 90 minutes")
    yield "# Reinforcement learning on language models\n\nA lab of 90 minutes\n"
    yield "## The plan\n\n| minutes | what |\n|---|---|\n" + "".join(f"| {m} | {what} |\n" for m, what, _ in plan)
    for minutes, what, expected in plan:
        yield f"## Minutes {minutes}\n\n{what}\n\n*Look for:* {expected}\n"
        for number in re.findall(r"lesson_(\d\d)\.md", what):
            yield from lesson_slides(int(number), whole=False)


def session(number: int) -> Iterator[str]:
    """The slides of one of the five sessions."""
    title, lessons, in_class, at_home = rows("Five sessions of three hours")[number - 1]
    yield f"# Session {title.replace(' ', ': ', 1)}\n\nLessons {lessons}\n"
    for lesson in lessons.split(", "):
        yield from lesson_slides(int(lesson))
    yield from exercise_slides("Exercises in class", in_class)
    yield from exercise_slides("At home", at_home)


def decks() -> dict[str, list[str]]:
    """The slides of each file, in Markdown."""
    sessions = {f"session_{i}": list(session(i)) for i in range(1, len(rows("Five sessions of three hours")) + 1)}
    return {"lab": list(lab()), **sessions}


def as_html(name: str, slides: Sequence[str]) -> str:
    """A file of slides, with its pictures inside."""
    from latex2mathml.converter import convert
    from markdown import markdown

    def picture(match: re.Match[str]) -> str:
        data = base64.b64encode((FOLDER / match[2]).read_bytes()).decode()
        return f'<img alt="{match[1]}" src="data:image/svg+xml;base64,{data}">'

    def slide(place: int, text: str) -> str:
        equations: list[str] = []

        def keep(match: re.Match[str]) -> str:
            equations.append(convert(match[1] or match[2], display="block" if match[1] else "inline"))
            return f"xMATHx{len(equations) - 1}x"

        pieces = re.split(r"(^```.*?^```$|`[^`\n]*`)", text, flags=re.M | re.S)
        text = "".join(p if i % 2 else MATH.sub(keep, p) for i, p in enumerate(pieces))
        text = re.sub(r"(?<!!)\[([^]]+)\]\((?![a-z]+:)[^)]+\)", r"\1", text)  # slides travel alone
        html = markdown(
            re.sub(r"^!\[([^]]*)\]\(([^)]+)\)$", picture, text, flags=re.M), extensions=["tables", "fenced_code"]
        )
        html = re.sub(r"xMATHx(\d+)x", lambda m: equations[int(m[1])], html)
        return f'<section>\n{html}\n<div class="place">{place} of {len(slides)}</div></section>'

    body = "\n".join(slide(i, text) for i, text in enumerate(slides, start=1))
    css = (FOLDER / "slides.css").read_text(encoding="utf-8")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name.replace("_", " "))}</title>'
        f"<style>\n{css}</style></head>\n<body>\n{body}\n<script>{KEYS}</script></body></html>\n"
    )


def as_pdf(file: Path) -> Path | None:
    """Prints a file; None if there is no browser."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return None
    pdf = file.with_suffix(".pdf")
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
        command = [browser, *flags, f"--print-to-pdf={pdf}", file.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    return pdf


def main() -> None:
    """Writes all files, and says what is missing."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/slides")
    out.mkdir(parents=True, exist_ok=True)
    for name, slides in decks().items():
        file = out / f"{name}.html"
        try:
            file.write_text(as_html(name, slides), encoding="utf-8")
        except ImportError as error:
            sys.exit(f"slides need the extra `docs` ({error}): pip install -e '.[docs]'")
        pdf = as_pdf(file)
        print(f"{file}: {len(slides)} slides" + (f", and {pdf.name}" if pdf else ""))
        if pdf is None:
            print(f"no PDF: none of {', '.join(BROWSERS)} is installed. Print {file} from a browser instead")


if __name__ == "__main__":
    main()
