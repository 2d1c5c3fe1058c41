"""The README's code blocks run as they stand. The examples run as notebooks: test_notebooks.py."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block(number: int) -> None:
    exec(compile(BLOCKS[number], f"README.md, python block {number}", "exec"), {"__name__": "__main__"})
