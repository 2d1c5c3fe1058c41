"""Makes the figures and the notebooks of the lessons from their pages, and the notebooks of the examples.

    python docs/lessons/make.py [NUMBER ...]    # runs the code, which draws the figures, into docs/lessons/figures
    python docs/lessons/make.py --notebooks     # writes docs/lessons/notebooks
    python docs/lessons/make.py --execute lesson_02 --source lmgym.whl    # as in Colab; writes lesson_02.ipynb here

What else a lesson writes stays in a temporary folder.
"""

import argparse
import ast
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGES = {int(path.stem[-2:]): path for path in sorted(FOLDER.glob("lesson_*.md"))}
"""The page of each lesson."""
EXAMPLES = sorted(FOLDER.parents[1].glob("examples/[0-9]*.py"))


def blocks(page: str) -> list[str]:
    """The Python code of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)


def run_lesson(number: int) -> None:
    """Runs the code of a lesson in the current folder, where its figure goes."""
    os.environ["SOURCE_DATE_EPOCH"] = "0"  # matplotlib then writes no date into an SVG
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    with mpl.rc_context({"svg.hashsalt": "lmgym", "svg.fonttype": "none"}):
        names: dict[str, object] = {"__name__": "__main__"}
        for place, code in enumerate(blocks(PAGES[number].read_text(encoding="utf-8"))):
            exec(compile(code, f"{PAGES[number].name}, block {place}", "exec"), names)
        pyplot.close("all")


INSTALL = """# For Colab, or any place without lmgym. SOURCE: a package, a wheel, or an address that pip takes.
SOURCE = "lmgym"
import importlib.util
import warnings

warnings.filterwarnings("ignore", "IProgress not found")  # nothing here needs ipywidgets
if importlib.util.find_spec("lmgym") is None:
    %pip install -q {SOURCE}"""


def notebooks() -> dict[str, dict[str, Any]]:
    """All notebooks by the names of their files, without results."""
    lessons = {page.stem: notebook(lesson_cells(page.read_text(encoding="utf-8"))) for page in PAGES.values()}
    return lessons | {f"example_{path.stem}": notebook(example_cells(path)) for path in EXAMPLES}


def lesson_cells(page: str) -> list[tuple[str, str]]:
    """The text and the code of a lesson, in order."""
    page = re.sub(r"^!\[[^]]*\]\([^)]*\)\n", "", page, flags=re.M)  # the code draws it
    page = re.sub(r"\[([^]]+)\]\((?![a-z]+:)[^)]+\)", r"\1", page)  # a notebook travels alone
    parts = re.split(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    return [("markdown" if i % 2 == 0 else "code", part.strip()) for i, part in enumerate(parts) if part.strip()]


def example_cells(path: Path) -> list[tuple[str, str]]:
    """An example: its docstring as text, a cell for each function and class, the call of `main`, and its picture."""
    source = path.read_text(encoding="utf-8")
    module = ast.parse(source)
    about = re.sub(r"^python examples/.*\n?", "", ast.get_docstring(module) or "", flags=re.M)
    about = re.sub(r"^(\w[\w ]+?) {2,}(.+)$", r"- **\1**: \2", about.strip(), flags=re.M)  # a table of two columns
    number, _, name = path.stem.partition("_")
    cells = [("markdown", f"# Example {int(number)}: {name.replace('_', ' ')}\n\n{about}")]
    # A notebook shows the value of a cell's last expression, if no semicolon follows.
    cells += [("code", code + ";" * code.endswith('"""')) for code in _pieces(source, module)]
    cells.append(("code", "main();"))
    if picture := re.search(r"runs/examples/\w+\.png", source):
        cells.append(("code", f'from IPython.display import Image\n\nImage("{picture[0]}")'))
    return cells


def _pieces(source: str, module: ast.Module) -> Iterator[str]:
    """The code between the docstring and `if __name__ == "__main__"`: definitions, and what is between them."""
    lines = source.splitlines()
    *body, _ = module.body
    begin = end = body[0].end_lineno or 0
    for node in body[1:]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if begin < end:
                yield "\n".join(lines[begin:end]).strip()
            # What is above a definition and below the last statement belongs to it: comments and decorators.
            yield "\n".join(lines[end : node.end_lineno]).strip()
            begin = node.end_lineno or 0
        end = node.end_lineno or 0
    if begin < end:
        yield "\n".join(lines[begin:end]).strip()


def notebook(cells: list[tuple[str, str]]) -> dict[str, Any]:
    """A notebook without results, whose second cell installs lmgym; the first one is the title."""
    cells = [cells[0], ("code", INSTALL), *cells[1:]]
    return {
        "cells": [
            {"cell_type": kind, "id": f"cell-{i}", "metadata": {}, "source": source.splitlines(keepends=True)}
            | ({"execution_count": None, "outputs": []} if kind == "code" else {})
            for i, (kind, source) in enumerate(cells)
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def as_text(made: dict[str, Any]) -> str:
    """What the file of a notebook holds."""
    return json.dumps(made, ensure_ascii=False, indent=1) + "\n"


def execute(name: str, source: str | None) -> None:
    """Runs a notebook in a kernel of its own in the current folder, and writes it there with its results.

    Args:
        name: of the notebook.
        source: what its first cell installs lmgym from, where it is missing.
    """
    import nbclient
    import nbformat

    text = as_text(notebooks()[name])
    if source is not None:
        text = text.replace(json.dumps('SOURCE = "lmgym"\n'), json.dumps(f"SOURCE = {str(Path(source).resolve())!r}\n"))
    book = nbformat.reads(text, as_version=4)
    nbclient.NotebookClient(book, timeout=None).execute()
    nbformat.write(book, f"{name}.ipynb")


def draw(number: int) -> None:
    """Runs a lesson in a temporary folder, and keeps its figure."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            run_lesson(number)
            shutil.copy(f"lesson_{number:02}.svg", FOLDER / "figures")
        finally:
            os.chdir(home)


def main() -> None:
    """Runs the lessons that the command line names, or all; or writes the notebooks, or runs some."""
    parser = argparse.ArgumentParser(description="figures and notebooks of the lessons")
    parser.add_argument("names", nargs="*", help="numbers of lessons; with --execute, names of notebooks")
    parser.add_argument("--notebooks", action="store_true", help="write all notebooks, without results")
    parser.add_argument("--execute", action="store_true", help="run notebooks, and write them with their results here")
    parser.add_argument("--source", help="a wheel, for the first cell of a notebook")
    wanted = parser.parse_args()
    if wanted.notebooks:
        for name, made in notebooks().items():
            (FOLDER / "notebooks" / f"{name}.ipynb").write_text(as_text(made), encoding="utf-8")
        return
    for name in wanted.names or (notebooks() if wanted.execute else PAGES):
        started = time.perf_counter()
        print(f"--- {name}")
        if wanted.execute:
            execute(name, wanted.source)
        else:
            draw(int(name))
        print(f"    {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
