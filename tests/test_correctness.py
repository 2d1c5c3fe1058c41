"""docs/correctness.md: its example runs, and its table is that of the mutation gate as it stands."""

import re
from typing import Any

import pytest
from mutants import BEGIN, END, MUTANTS, PAGE, ROOT, planted, rows_of_page, where

TEXT = PAGE.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(block, "docs/correctness.md", "exec"), names)
    out = capsys.readouterr().out
    assert "ok    its gradient is the policy gradient" in out
    assert "FAIL" not in out


def test_the_links_of_the_page_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert all((PAGE.parent / link).exists() for link in links if "://" not in link)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_planted_bug_still_has_its_line(mutant: Any) -> None:
    planted(mutant, ROOT)
    for test in re.findall(r"(\S+?)::(\w+)", " ".join(mutant.tests)):
        file, name = test
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"no test {name} in {file}"


def test_the_table_is_up_to_date() -> None:
    """All but the last column, for which every bug would have to be planted: `make mutants FLAGS=--write`."""
    assert TEXT.index(BEGIN) < TEXT.index(END)
    rows = rows_of_page()
    assert [(bug, place) for bug, place, _ in rows] == [(mutant.bug, where(mutant)) for mutant in MUTANTS]
    for _, _, test in rows:
        file, name = re.fullmatch(r"(\w+\.py)::(\w+)(?:\[.*\])?", test).groups()  # pyright: ignore
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"no test {name} in {file}"


def test_names_are_names() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len({mutant.bug for mutant in MUTANTS}) == len(MUTANTS) >= 24
