"""The map "Where is it tested?": complete, true, and the same in CONTRIBUTING.md."""

import re
from pathlib import Path

import pytest
from quick import TESTED_BY, relevant_tests

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path.relative_to(ROOT).as_posix() for room in ("lmgym", "agents") for path in (ROOT / room).rglob("*.py")]


@pytest.mark.parametrize("path", SOURCES)
def test_every_source_file_has_tests(path: str) -> None:
    assert relevant_tests(path) or path.startswith("agents/tools/")


def test_the_map_names_tests_and_files_that_exist() -> None:
    for entry, tests in TESTED_BY.items():
        assert (ROOT / entry).exists(), entry
        assert all((ROOT / "tests" / f"{test}.py").exists() for test in tests), entry


def test_the_longest_entry_counts() -> None:
    assert relevant_tests("agents/training/batch.py") == TESTED_BY["agents/training/"]
    assert relevant_tests("agents/rloo.py") == TESTED_BY["agents/"]
    assert relevant_tests("tests/test_env.py") == ("test_env",)
    assert relevant_tests("LICENSE") == ()


def test_contributing_shows_the_same_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w/.]+)` \| (.*) \|$", text, re.M)
    shown = {entry: tuple(re.findall(r"`(\w+)`", tests)) for entry, tests in rows}
    assert shown == {entry: tests for entry, tests in TESTED_BY.items() if tests}
