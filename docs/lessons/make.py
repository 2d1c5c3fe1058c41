"""Runs the code of the lessons, which draws their figures: `python docs/lessons/make.py [NUMBER ...]`.

The figures go to docs/lessons/figures; what else a lesson writes stays in a temporary folder.
"""

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

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


def main() -> None:
    """Runs the lessons that the command line names, or all."""
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
