"""The pages of the lessons: parts, short sentences, right links; the glossary, slides, the page of what-ifs."""

import json
import math
import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agents import cli
from agents.lessons import all_exercises

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "lessons"
MAKE: dict[str, Any] = runpy.run_path(str(FOLDER / "make.py"))
PAGES: dict[int, Path] = MAKE["PAGES"]
PARTS = ("Theory", "Code", "Change this and see", "Questions", "Exercises and what to read next")
MOST_WORDS = 30
PROSE = [*PAGES.values(), FOLDER / "README.md", ROOT / "docs/glossary.md", ROOT / "docs/teaching.md"]


def sentences(page: str) -> list[str]:
    """The sentences of a page, without code, tables, headings, equations and the targets of links."""
    prose = re.sub(r"^```.*?^```$|^\$\$.*?^\$\$$", "\n\n", page, flags=re.M | re.S)
    prose = re.sub(r"^\|.*$|^#.*$", "\n", prose, flags=re.M)
    prose = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", prose)
    paragraphs = re.split(r"\n\s*\n|^(?:- |\d+\. )", prose, flags=re.M)
    ends = r"(?<=[.?!])\**\s+(?=[A-Z*`“\"$\d(ρπβλ])"
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
        assert target.startswith("https://") or (path.parent / target).is_file(), target


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


# What is made from the lessons ---------------------------------------------------------------------------------------

SLIDES: dict[str, Any] = runpy.run_path(str(FOLDER / "slides.py"))


def test_every_lesson_is_in_one_session_and_no_slide_is_too_full() -> None:
    decks = SLIDES["decks"]()
    assert list(decks) == ["lab", *(f"session_{i}" for i in range(1, 6))]
    sessions = [slide for name, slides in decks.items() if name != "lab" for slide in slides]
    titles = [slide.partition("\n")[0] for slide in sessions if slide.startswith("# Lesson")]
    assert titles == [path.read_text(encoding="utf-8").partition("\n")[0] for path in PAGES.values()]
    for lesson, page in PAGES.items():
        text = page.read_text(encoding="utf-8")
        assert f"(figures/lesson_{lesson:02}.svg)" in "".join(sessions)
        code = [line for block in MAKE["blocks"](text) for line in block.splitlines() if line.strip()]
        assert not [line for line in code if line not in "".join(sessions)], "all the code is there"
    for slide in [*sessions, *decks["lab"]]:
        code = [line for block in re.findall(r"^```\w+\n(.*?)^```$", slide, re.M | re.S) for line in block.splitlines()]
        words = len(re.sub(r"^```.*?^```$", "", slide, flags=re.M | re.S).split())
        assert len(code) <= 20, slide
        assert words + 4 * len(code) <= 145, slide
    assert "- 2.1 " in "".join(decks["session_2"])
    assert "halve the errors" in "".join(decks["lab"])


def test_the_slides_are_files_of_their_own() -> None:
    for name, slides in SLIDES["decks"]().items():
        page = SLIDES["as_html"](name, slides)
        assert page.count("<section>") == len(slides)
        assert ("<math" in page) == any("$$" in slide for slide in slides)
        assert "xMATHx" not in page
        assert "$$" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
        assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def test_the_examples_are_listed_in_their_order() -> None:
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[(\d\d)\]\(\.\./\.\./examples/(\d\d_\w+\.py)\) \|", index, re.M)
    assert [name for _, name in listed] == sorted(path.name for path in (ROOT / "examples").glob("[0-9]*.py"))
    assert all(name.startswith(number) for number, name in listed)


@pytest.mark.slow
def test_lesson_11_ends_with_a_row_of_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = PAGES[11].read_text(encoding="utf-8")
    (make,) = re.findall(r"^```python no-run\n(.*?)^```$", page, re.M | re.S)
    (command,) = re.findall(r"^lmgym (benchmark .*)$", page, re.M)
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MAKE["blocks"](page)[0] + "\n\n" + make, encoding="utf-8")
    assert cli.main(command.split()) == 0
    table = Path("runs/benchmark/text-v1/table.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `mine` \| (.*) \|$", table, re.M)
    (shown,) = re.findall(r"^ +mean +([\d.]+)", page, re.M)
    assert abs(float(row.split(" | ")[1]) - float(shown)) < 0.05


# The page "What if?" -------------------------------------------------------------------------------------------------

WHAT_IF: dict[str, Any] = runpy.run_path(str(FOLDER / "what_if.py"))


def test_the_page_shows_its_data_and_runs_one_file_of_script() -> None:
    data = json.loads((FOLDER / "what_if.json").read_text(encoding="utf-8"))
    page = (FOLDER / "what_if.html").read_text(encoding="utf-8")
    assert page == WHAT_IF["page"](data), "python docs/lessons/what_if.py --page"
    assert re.findall(r"<script[^>]*>", page) == ['<script src="what_if.js">']
    assert not re.search(
        r"\son\w+=|https?:", page + (FOLDER / "what_if.js").read_text().replace("http://www.w3.org", "")
    )
    choices = WHAT_IF["CHOICES"]
    assert (
        len(re.findall(r"<tr data-score", page)) == len(data["combinations"]) == math.prod(map(len, choices.values()))
    )
    assert "-dirty" not in data["made"], "made by what is committed"


def test_no_result_is_better_than_what_is_possible() -> None:
    data = json.loads((FOLDER / "what_if.json").read_text(encoding="utf-8"))
    edge = np.array(data["frontier"])
    for name, found in data["combinations"].items():
        best = data["optimum"][name.split()[0]]
        assert max(found["end"]) <= best + 1e-3, name
        # Both are concave in the policy, so the mean of the seeds is below the edge too.
        for kl, score in zip(found["kl"], found["score"], strict=True):
            assert score <= np.interp(kl, edge[:, 1], edge[:, 0]) + 0.02, (name, kl)
    means = {name: sum(found["end"]) / len(found["end"]) for name, found in data["combinations"].items()}
    reached = {b: max(m for n, m in means.items() if n.split()[0] == b) / best for b, best in data["optimum"].items()}
    assert min(reached.values()) > 0.85, "some combination comes near the optimum for every β"


def test_the_small_world_is_the_tree_and_the_data_are_made_again() -> None:
    world = WHAT_IF["World"](WHAT_IF["small_world"]())
    same = world.logp_of_texts(world.reference_logp[None])[0]
    torch.testing.assert_close(same, world.tree.reference_logp, atol=1e-5, rtol=0)
    uniform = torch.rand(1, 20_000, 3, generator=torch.Generator().manual_seed(0))
    *_, text = WHAT_IF["sample"](world, world.reference_logp[None], uniform)
    shares = torch.bincount(text[0], minlength=85) / 20_000
    torch.testing.assert_close(shares.double(), world.tree.reference_logp.exp(), atol=0.012, rtol=0)
    WHAT_IF["train"].__globals__["UPDATES"] = 3
    scores, kls = WHAT_IF["train"](world, [(0.1, 0.2, 0.95)])
    data = json.loads((FOLDER / "what_if.json").read_text(encoding="utf-8"))["combinations"]["0.1 0.2 0.95"]
    assert scores.mean((0, 1)).tolist() == pytest.approx(data["score"][:4], abs=2e-3)
    assert kls.mean((0, 1)).tolist() == pytest.approx(data["kl"][:4], abs=1e-2)
