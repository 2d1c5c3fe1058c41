"""The pages of the lessons: their code runs and draws the figure, their sentences are short, their links are right."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from agents.lessons import all_exercises

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "lessons"
MAKE: dict[str, Any] = runpy.run_path(str(FOLDER / "make.py"))
PAGES: dict[int, Path] = MAKE["PAGES"]
SLOW = (0, 1, 10, 11, 12)
"""Lessons that run a language model for seconds; `pytest -m slow` runs them too."""
PARTS = ("Theory", "Code", "Change this and see", "Questions", "Exercises and what to read next")
MOST_WORDS = 30
PROSE = [*PAGES.values(), FOLDER / "README.md", ROOT / "docs/glossary.md", ROOT / "docs/teaching.md"]


def sentences(page: str) -> list[str]:
    """The sentences of a page, without code, tables, headings, equations and the targets of links."""
    prose = re.sub(r"^```.*?^```$|^\$\$.*?^\$\$$", "\n\n", page, flags=re.M | re.S)
    prose = re.sub(r"^\|.*$|^#.*$", "\n", prose, flags=re.M)
    prose = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", prose)
    paragraphs = re.split(r"\n\s*\n|^(?:- |\d+\. )", prose, flags=re.M)
    ends = r"(?<=[.?!:;])\**\s+(?=[A-Z*`“\"$\d(ρπβλ])"
    return [" ".join(s.split()) for p in paragraphs for s in re.split(ends, p) if s.strip()]


def test_long_sentences_are_found() -> None:
    long = "One " + "word " * 30 + "too many."
    assert [s for s in sentences(f"# Title\n\nShort. {long}\n\n- A point\n") if len(s.split()) > MOST_WORDS] == [long]
    assert sentences("```python\nprint(1)\n```\n| a | b |\n") == []


def test_there_is_a_page_for_every_lesson_and_the_table_leads_to_it() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert list(PAGES) == list(range(13))
    for lesson, path in PAGES.items():
        numbers = [e.number for e in all_exercises() if e.lesson == lesson]
        row = rf"^\| \[{lesson}\]\({path.name}\) .* \| {numbers[0]} to {numbers[-1]} \|$"
        assert re.search(row, index, re.M), f"no row for lesson {lesson}"


@pytest.mark.parametrize("path", PROSE, ids=lambda p: p.stem)
def test_sentences_are_short(path: Path) -> None:
    for sentence in sentences(path.read_text(encoding="utf-8")):
        assert len(sentence.split()) <= MOST_WORDS, sentence


@pytest.mark.parametrize("lesson", PAGES)
def test_the_page_has_all_its_parts(lesson: int) -> None:
    page = PAGES[lesson].read_text(encoding="utf-8")
    assert page.startswith(f"# Lesson {lesson}: ")
    assert "**Goal.** " in page
    assert re.search(r"Time:\s+\d\d minutes\.", page)
    assert tuple(re.findall(r"^## (.+)$", page, re.M)) == PARTS
    questions, answers = page.partition("## Questions")[2].split("**Answers.**")
    for place in (1, 2, 3):
        assert re.search(rf"^{place}\. .+\?", questions, re.M), f"question {place}"
        assert re.search(rf"(?:^|\s){place}\. ", answers), f"answer {place}"
    pictures = re.findall(r"^!\[(.{20,})\]\((.+)\)$", page, re.M)
    assert [target for _, target in pictures] == [f"figures/lesson_{lesson:02}.svg"]
    assert f'figure.savefig("lesson_{lesson:02}.svg")' in page


@pytest.mark.parametrize("path", PROSE, ids=lambda p: p.stem)
def test_links_lead_to_files(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("lesson", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in PAGES])
def test_the_code_runs_and_draws_the_figure(
    lesson: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    MAKE["run_lesson"](lesson)
    assert capsys.readouterr().out.strip()
    drawn = (tmp_path / f"lesson_{lesson:02}.svg").read_text(encoding="utf-8")
    committed = (FOLDER / "figures" / f"lesson_{lesson:02}.svg").read_text(encoding="utf-8")
    assert (
        re.findall(r"<text[^>]*>([^<]*)</text>", drawn)[-1] == re.findall(r"<text[^>]*>([^<]*)</text>", committed)[-1]
    )


@pytest.mark.parametrize("lesson", PAGES)
def test_the_notebook_is_that_of_the_page(lesson: int) -> None:
    made = MAKE["notebook"](lesson)
    file = FOLDER / "notebooks" / f"lesson_{lesson:02}.ipynb"
    assert file.read_text(encoding="utf-8") == MAKE["as_text"](made), "python docs/lessons/make.py --notebooks"
    code = ["".join(cell["source"]) for cell in made["cells"] if cell["cell_type"] == "code"]
    assert [block.strip() for block in MAKE["blocks"](PAGES[lesson].read_text(encoding="utf-8"))] == code[1:]
    assert code[0].count("SOURCE") == 3
    assert made["cells"][0]["source"][0].startswith(f"# Lesson {lesson}: ")
    assert not re.search(r"\]\((?!https?:)", "".join("".join(c["source"]) for c in made["cells"][::2][:1]))


@pytest.mark.slow
@pytest.mark.parametrize("lesson", [n for n in PAGES if n not in (10, 11)])
def test_the_notebook_runs_and_shows_its_figure(lesson: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a kernel of its own; lessons 10 and 11 take minutes, and their code runs above."""
    nbformat = pytest.importorskip("nbformat", reason="notebooks are run with the extra `notebooks`")
    client = pytest.importorskip("nbclient", reason="notebooks are run with the extra `notebooks`")
    pytest.importorskip("ipykernel", reason="notebooks are run with the extra `notebooks`")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.reads(MAKE["as_text"](MAKE["notebook"](lesson)), as_version=4)
    nbformat.validate(book)
    client.NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [kind for cell in book.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert "image/png" in shown


def test_the_glossary_has_symbols_units_and_lessons() -> None:
    page = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in re.findall(r"^\|.+\|$", page, re.M)][2:]
    assert len(rows) >= 60
    terms = [row[0].lower() for row in rows]
    assert terms == sorted(terms)
    assert len(set(terms)) == len(terms)
    for row in rows:
        assert len(row) == 5, row
        (lesson,) = re.findall(r"\[(\d+)\]\(lessons/lesson_\d\d\.md\)", row[4])
        assert f"lesson_{int(lesson):02}.md" in row[4]
        assert len(row[1]) > 10, row
