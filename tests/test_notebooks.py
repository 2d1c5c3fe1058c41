"""The notebooks of the lessons and the examples: made from their sources, and run cell by cell in a kernel.

This is how the code of the lessons and examples is tested. It runs in a small size and in one kernel, because a new
one would import torch again; `make full` runs each whole, in a kernel of its own.
"""

import ast
import json
import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "lessons"
MAKE: dict[str, Any] = runpy.run_path(str(FOLDER / "make.py"))
BOOKS: dict[str, dict[str, Any]] = MAKE["notebooks"]()
LESSONS = [name for name in BOOKS if name.startswith("lesson")]
EXAMPLES = {f"example_{path.stem}": path for path in MAKE["EXAMPLES"]}
ALL_BUT_ONE = (
    "seed", "lr", "metrics", "gradient", "order", "split", "mask", "length", "stop", "optimum",
)  # fmt: skip
SMALL = {
    "lesson_10": (
        ("--sft.examples 300", "--sft.examples 64"),
        ("--preferences.prompts 200", "--preferences.prompts 32 --preferences.test-prompts 16"),
        ("--ppo.updates 10 --ppo.rows 32", "--ppo.updates 2 --ppo.rows 8 --reward.normalise-on 16"),
        ("--test-prompts 64", "--test-prompts 16"),
    ),
    "lesson_11": (
        ('skip=("order", "stop", "optimum")', f"skip={ALL_BUT_ONE!r}"),
        ("updates=60", "updates=2"),
    ),
    "example_02": (("main()", "main(updates=2, rows=8)"),),
    "example_03": (("main()", "main(updates=2, rows=32)"),),
    "example_04": (("main()", "main(updates=1)"),),
    "example_05": (("main()", "main(steps=256)"),),
    "example_06": (("main()", "main(rollouts=2, updates=1)"),),
    "example_07": (("main()", "main(updates=2, rows=8)"),),
    "example_08": (("main()", f"main(updates=2, skip={ALL_BUT_ONE!r})"),),
    "example_09": (("main()", "main(updates=1)"),),
}
"""What is replaced in a notebook, so that it takes seconds: here the question is whether it runs."""
MOST_SECONDS = {name: 900 if name == "lesson_10" else 120 for name in LESSONS}
"""How long the code of a lesson may take on two cores, with the start of the kernel."""
SLOW = ("lesson_10", "example_06_baselines_and_variance", "example_08_break_it_and_watch")
"""Notebooks that take seconds in the small size too."""
FRESH = """%reset -f
%matplotlib inline
__import__("os").chdir({folder!r})
__import__("matplotlib").rcParams["svg.fonttype"] = "none"
"""
"""Before the first cell of each notebook, because the kernel ran others. It leaves no name behind."""


def code_of(book: dict[str, Any]) -> list[str]:
    return ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]


def book_of(name: str, folder: Path, small: bool) -> Any:
    """The notebook, to be run in a folder."""
    book = nbformat.reads(MAKE["as_text"](BOOKS[name]), as_version=4)
    nbformat.validate(book)
    book.cells.insert(0, nbformat.v4.new_code_cell(FRESH.format(folder=str(folder))))
    for old, new in SMALL.get(name[:10] if name in EXAMPLES else name, ()) if small else ():
        cells = [cell for cell in book.cells if cell.cell_type == "code" and old in cell.source]
        assert cells, f"{old!r} is nowhere in {name}"
        cells[-1].source = cells[-1].source.replace(old, new)
    return book


def check_results(name: str, book: Any, folder: Path) -> None:
    """It printed something, but no warning and no bare value, and shows its figure with the words of the page's."""
    outputs = [out for cell in book.cells for out in cell.get("outputs", [])]
    assert [out for out in outputs if out.get("name") == "stdout" or "text/html" in out.get("data", {})]
    assert not [out.text for out in outputs if out.get("name") == "stderr"]
    assert not [out.data for out in outputs if out.output_type == "execute_result" and "image/png" not in out.data]
    shown = [out.data["image/png"] for out in outputs if "image/png" in out.get("data", {})]
    code = "".join(code_of(BOOKS[name]))
    assert len(shown) == ("savefig" in code)
    if name in LESSONS:
        texts = [
            re.findall(r"<text[^>]*>([^<]*)</text>", (place / f"{name}.svg").read_text(encoding="utf-8"))
            for place in (folder, FOLDER / "figures")
        ]
        assert texts[0][-1] == texts[1][-1]


def environment(folder: Path) -> dict[str, str]:
    """Of a kernel: this checkout, no network, and no history in the user's home."""
    own = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nbclient.NotebookClient]:
    """One kernel for all notebooks of this process."""
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(), timeout=110)
    with client.setup_kernel(env=environment(tmp_path_factory.mktemp("ipython"))):
        yield client


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in BOOKS])
def test_it_runs_in_a_small_size(name: str, kernel: nbclient.NotebookClient, tmp_path: Path) -> None:
    kernel.nb = book = book_of(name, tmp_path, small=True)
    kernel.execute(cleanup_kc=False)
    check_results(name, book, tmp_path)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.timeout(MOST_SECONDS.get(n, 600))) for n in BOOKS])
def test_it_runs_whole_in_the_time_that_it_may_take(name: str, tmp_path: Path) -> None:
    book = book_of(name, tmp_path, small=False)
    nbclient.NotebookClient(book, timeout=None).execute(env=environment(tmp_path))
    check_results(name, book, tmp_path)


@pytest.mark.parametrize("name", BOOKS)
def test_the_file_is_made_from_its_source(name: str) -> None:
    text = (FOLDER / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert text == MAKE["as_text"](BOOKS[name]), "python docs/lessons/make.py --notebooks"
    assert BOOKS[name]["cells"][0]["source"][0].startswith("# ")
    assert code_of(BOOKS[name])[0].count("SOURCE") == 3


def test_there_is_a_notebook_of_each_lesson_and_example_and_no_other() -> None:
    assert len(LESSONS) == 13
    assert len(EXAMPLES) >= 9
    assert sorted(path.stem for path in (FOLDER / "notebooks").iterdir()) == sorted(BOOKS)


@pytest.mark.parametrize(("lesson", "page"), MAKE["PAGES"].items())
def test_a_lesson_has_the_code_of_its_page(lesson: int, page: Path) -> None:
    book = BOOKS[f"lesson_{lesson:02}"]
    blocks = MAKE["blocks"](page.read_text(encoding="utf-8"))
    assert [block.strip() for block in blocks] == code_of(book)[1:]
    text = "".join("".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "markdown")
    assert not re.search(r"\]\((?!https?:)", text), "a link to a file that a notebook does not have"


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_all_its_code_in_order(name: str) -> None:
    _, *cells = code_of(BOOKS[name])
    picture = "Image(" in cells[-1]
    assert cells[-1 - picture] == "main();"
    _, *statements, start = ast.parse(EXAMPLES[name].read_text(encoding="utf-8")).body
    made = ast.parse("\n".join(cells[: -1 - picture]))
    assert ast.dump(made) == ast.dump(ast.Module(statements, []))
    assert ast.unparse(start) == "if __name__ == '__main__':\n    main()"
    comments = re.findall(r"^ *#.*$", EXAMPLES[name].read_text(encoding="utf-8"), re.M)
    assert comments == re.findall(r"^ *#.*$", "\n".join(cells), re.M)


def test_another_source_is_written_into_the_first_cell_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(nbclient.NotebookClient, "execute", lambda self: ran.append(self.nb))
    monkeypatch.chdir(tmp_path)
    MAKE["execute"]("lesson_02", "dist/lmgym-1-py3-none-any.whl")
    assert json.loads(Path("lesson_02.ipynb").read_text(encoding="utf-8")).keys() >= {"cells"}
    first, *rest = [cell.source for cell in ran[0].cells if cell.cell_type == "code"]
    assert f"SOURCE = {str(tmp_path / 'dist/lmgym-1-py3-none-any.whl')!r}\n" in first
    assert rest == code_of(BOOKS["lesson_02"])[1:]
