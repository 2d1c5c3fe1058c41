"""Makes the figures and the notebooks of the lessons from their pages.

    python docs/lessons/make.py [NUMBER ...]    # runs the code, which draws the figures, into docs/lessons/figures
    python docs/lessons/make.py --notebooks     # writes docs/lessons/notebooks

What else a lesson writes stays in a temporary folder.
"""

import json
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGES = {int(path.stem[-2:]): path for path in sorted(FOLDER.glob("lesson_*.md"))}
"""The page of each lesson."""


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

if importlib.util.find_spec("lmgym") is None:
    %pip install -q {SOURCE}"""


def notebook(number: int) -> dict[str, Any]:
    """A lesson as a notebook, without results: its text, its code, and a first cell that installs lmgym."""
    page = PAGES[number].read_text(encoding="utf-8")
    page = re.sub(r"^!\[[^]]*\]\([^)]*\)\n", "", page, flags=re.M)  # the code draws it
    page = re.sub(r"\[([^]]+)\]\((?![a-z]+:)[^)]+\)", r"\1", page)  # a notebook travels alone
    parts = re.split(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)
    cells = [("code", INSTALL)]
    cells += [("markdown" if i % 2 == 0 else "code", part.strip()) for i, part in enumerate(parts) if part.strip()]
    cells[0], cells[1] = cells[1], cells[0]  # the title first
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


def main() -> None:
    """Runs the lessons that the command line names, or all; or writes the notebooks."""
    if sys.argv[1:] == ["--notebooks"]:
        for number, page in PAGES.items():
            (FOLDER / "notebooks" / f"{page.stem}.ipynb").write_text(as_text(notebook(number)), encoding="utf-8")
        return
    home = Path.cwd()
    for number in [int(argument) for argument in sys.argv[1:]] or list(PAGES):
        started = time.perf_counter()
        print(f"--- lesson {number}")
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                run_lesson(number)
                shutil.copy(f"lesson_{number:02}.svg", FOLDER / "figures")
            finally:
                os.chdir(home)
        print(f"    {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
