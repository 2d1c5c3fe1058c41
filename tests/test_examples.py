"""The README's code blocks and the examples run as they stand."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
ALL_BUT_ONE = (
    "seed", "lr", "metrics", "gradient", "order", "split", "mask", "length", "stop", "optimum",
)  # fmt: skip
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))
LONG = ("06_baselines_and_variance", "08_break_it_and_watch")


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 3
    assert len(EXAMPLES) >= 9


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block(number: int) -> None:
    exec(compile(BLOCKS[number], f"README.md, python block {number}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in LONG else []) for path in EXAMPLES],
)
def test_example(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the pictures go
    # Fewer updates than a reader would run: here the question is whether it runs.
    short = {
        "02": {"updates": 2, "rows": 8},
        "03": {"updates": 2, "rows": 32},
        "04": {"updates": 1},
        "05": {"steps": 256},
        "06": {"rollouts": 2, "updates": 1},
        "07": {"updates": 2, "rows": 8},
        "08": {"updates": 2, "skip": ALL_BUT_ONE},
        "09": {"updates": 1},
    }
    runpy.run_path(str(path))["main"](**short.get(path.stem[:2], {}))
    printed = capsys.readouterr().out.strip()
    assert printed
    for picture in re.findall(r"runs/examples/\w+\.png", printed):
        assert (tmp_path / picture).stat().st_size > 10_000
