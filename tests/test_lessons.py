"""The exercises: every solution passes, every blank and typical wrong answer fails and is told why."""

import re
from functools import partial
from pathlib import Path

import pytest
from answers import ANSWERS
from answers.model import Key

from agents import cli
from agents.lessons import Exercise, all_exercises, check_file, find
from agents.lessons.catalog import Verdict
from agents.lessons.exercises import lesson_11
from lmgym.testing import check_algorithm

EXERCISES = all_exercises()
SLOW = ("11.1", "11.2", "11.3")
"""Exercises whose oracle, `check_algorithm`, takes seconds for one answer."""
NUMBERS = [pytest.param(e.number, marks=[pytest.mark.slow] * (e.number in SLOW)) for e in EXERCISES]


def changed(source: str, old: str, new: str) -> str:
    """Replaces the last occurrence: the code comes after the docstring."""
    before, found, after = source.rpartition(old)
    assert found, f"{old!r} does not occur in\n{source}"
    return before + new + after


def solution(exercise: Exercise) -> str:
    source = exercise.start
    for old, new in ANSWERS[exercise.number].fix:
        source = changed(source, old, new)
    return source


def graded(number: str, source: str, folder: Path) -> Verdict:
    file = folder / "answer.py"
    file.write_text(source, encoding="utf-8")
    return check_file(number, file)


def test_there_are_enough_exercises_of_each_kind() -> None:
    assert ANSWERS.keys() == {e.number for e in EXERCISES}
    assert len(EXERCISES) >= 40
    assert sum(e.kind == "mend" for e in EXERCISES) >= 15
    for lesson in range(13):
        assert sum(e.lesson == lesson for e in EXERCISES) >= (3 if lesson else 1), lesson
    assert sum(len(key.wrong) >= 2 for key in ANSWERS.values()) >= 0.9 * len(ANSWERS)
    assert sum(len(key.hidden) for key in ANSWERS.values()) >= 20
    for e in EXERCISES:
        assert len(e.hints) == 3
        assert e.start.startswith(f'"""Exercise {e.number}: ')
        assert ("This code has a bug" in e.start) == (e.kind == "mend"), e.number


@pytest.mark.parametrize("number", NUMBERS)
def test_the_solution_passes_and_the_start_does_not(number: str, tmp_path: Path) -> None:
    verdict = graded(number, solution(find(number)), tmp_path)
    assert verdict.passed, verdict.message
    verdict = graded(number, find(number).start, tmp_path)
    assert not verdict.passed
    assert ANSWERS[number].start in verdict.message, verdict.message


@pytest.mark.parametrize("number", NUMBERS)
def test_wrong_answers_are_told_what_is_wrong(number: str, tmp_path: Path) -> None:
    key: Key = ANSWERS[number]
    right = solution(find(number))
    for old, new, message in key.wrong:
        verdict = graded(number, changed(right, old, new), tmp_path)
        assert not verdict.passed, f"{old} -> {new} passes"
        assert message in verdict.message, f"{old} -> {new}: {verdict.message}"
    for old, new in key.hidden:
        assert not graded(number, changed(right, old, new), tmp_path).passed, f"{old} -> {new} passes"


def test_an_algorithm_is_graded_by_the_checks_of_its_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick part of lesson 11: two of the checks."""
    quick = partial(check_algorithm, rows=16)
    others = ("seed", "lr", "gradient", "order", "padding", "split", "length", "stop", "optimum")
    monkeypatch.setattr(lesson_11, "check_algorithm", lambda train, skip, show: quick(train, skip=others, show=show))
    assert graded("11.1", solution(find("11.1")), tmp_path).passed
    assert ANSWERS["11.1"].start in graded("11.1", find("11.1").start, tmp_path).message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def episode_return(rewards, gamma):\n    return 1 +\n", "SyntaxError: .*, at line 2"),
        ("x = 1 / 0\n", "does not run: ZeroDivisionError: division by zero, at line 1: x = 1 / 0"),
        ("def other():\n    pass\n", "no function `episode_return`"),
        ("def episode_return(rewards, gamma):\n    return rewards[9]\n", "IndexError: .*, at line 2: return rewards"),
        ("def episode_return(rewards, gamma):\n    return 'x'\n", "you return a str; expected one number"),
        ("def episode_return(rewards, gamma):\n    return [1.0]\n", r"an array of shape \[1\]; expected one number"),
        ("def episode_return(rewards, gamma):\n    return float('nan')\n", "infinite or not a number"),
        ("def episode_return(a, b, c):\n    return 1\n", "TypeError: .*missing 1 required positional"),
        ("raise SystemExit\n", "ends the program"),
    ],
)
def test_a_file_that_cannot_be_graded(source: str, message: str, tmp_path: Path) -> None:
    verdict = graded("0.1", source, tmp_path)
    assert not verdict.passed
    assert re.search(message, verdict.message), verdict.message


def test_an_answer_that_changes_its_arguments_is_told_so(tmp_path: Path) -> None:
    source = "def grad_log_prob(logits, action):\n    logits -= logits.mean()\n    return logits\n"
    assert "changes a tensor that it was given" in graded("2.2", source, tmp_path).message


def test_an_answer_that_never_ends_is_given_up(tmp_path: Path) -> None:
    file = tmp_path / "endless.py"
    # It ends in the end, so that the test leaves no thread behind.
    file.write_text("import time\ntime.sleep(0.5)\n")
    assert "does a loop of it never end" in check_file("0.1", file, seconds=0.1).message


def test_the_command_shows_hints_and_grades(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def says(*arguments: str) -> tuple[int, str]:
        status = cli.main(["exercise", *arguments])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    status, text = says("list")
    assert status == 0
    assert len(text.splitlines()) == len(EXERCISES)
    assert says("show", "2.2") == (0, find("2.2").start)
    assert says("show", "2.2", "--to", "mine.py")[0] == 0
    assert Path("mine.py").read_text(encoding="utf-8") == find("2.2").start
    assert says("show", "2.2", "--to", "mine.py")[0] == 2, "an answer is never overwritten"
    status, text = says("check", "2.2", "mine.py")
    assert (status, text) == (
        1,
        "not yet: `grad_log_prob` returns nothing yet: write its body, and return the result\n",
    )
    Path("mine.py").write_text(solution(find("2.2")), encoding="utf-8")
    assert says("check", "2.2", "mine.py") == (0, "2.2 The score function: right\n")
    assert says("hint", "2.2", "--step", "3")[1].startswith("g = ")
    Path("class/ann").mkdir(parents=True)
    Path("class/ann/a.py").write_text(solution(find("2.2")), encoding="utf-8")
    Path("class/bob.py").write_text(find("0.3").start, encoding="utf-8")
    Path("class/notes.py").write_text("x = 1\n", encoding="utf-8")
    status, text = says("grade", "class")
    assert status == 0
    assert [line.split(",")[:3] for line in text.splitlines()] == [
        ["file", "exercise", "right"],
        ["ann/a.py", "2.2", "1"],
        ["bob.py", "0.3", "0"],
    ]
    for arguments, message in (
        (("grade", "class/none"), "no answer in"),
        (("hint", "2.2", "--step", "4"), "has the hints 1 to 3"),
        (("show",), "Give its number"),
        (("check", "2.2"), "which file?"),
        (("check", "2.2", "none.py"), "no file 'none.py'"),
    ):
        status, text = says(*arguments)
        assert status == 2
        assert message in text


def test_wrong_numbers_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no exercise '9.9': choose from 0.1, 0.2"):
        find("9.9")
    with pytest.raises(ValueError, match=r"no file .*: write the start with `lmgym exercise show 0.1 --to missing.py`"):
        check_file("0.1", tmp_path / "missing.py")
