"""The exercises in order, and the grading of a learner's file."""

import re
import runpy
import threading
from dataclasses import dataclass
from pathlib import Path

from agents.lessons import exercises as _modules  # noqa: F401  (importing it fills the table)
from agents.lessons.exercise import EXERCISES, Answer, Exercise, Wrong, described

SECONDS = 120.0
"""How long an answer may compute. Right answers take far less; lesson 11 takes the longest."""


@dataclass(frozen=True)
class Verdict:
    """What the grader says.

    Attributes:
        passed: whether the answer is right.
        message: what is wrong, or a line of praise.
    """

    passed: bool
    message: str


def all_exercises() -> list[Exercise]:
    """Every exercise, by lesson and place."""
    return sorted(EXERCISES.values(), key=lambda e: tuple(map(int, e.number.split("."))))


def find(number: str) -> Exercise:
    """The exercise of that number.

    Raises:
        ValueError: there is no such exercise.
    """
    if number not in EXERCISES:
        known = ", ".join(e.number for e in all_exercises())
        raise ValueError(f"no exercise {number!r}: choose from {known}")
    return EXERCISES[number]


def number_in(path: str | Path) -> str:
    """The number of the exercise that a file answers, from its first line; empty if that names no exercise."""
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        found = re.search(r"Exercise (\d+\.\d+):", file.readline())
    return found[1] if found else ""


def check_file(number: str, path: str | Path, seconds: float = SECONDS) -> Verdict:
    """Runs a learner's file and grades it. The file is the learner's own code and runs with their rights.

    Args:
        number: the exercise, such as "2.1".
        path: the learner's file.
        seconds: how long it may compute.

    Raises:
        ValueError: there is no such exercise, or no such file.
    """
    chosen = find(number)
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no file {str(file)!r}: write the start with `lmgym exercise show {number} --to {file.name}`")
    found: list[Verdict | BaseException] = []

    def grade() -> None:
        try:
            found.append(_grade(chosen, file))
        except BaseException as error:  # the grader's own: raised again below
            found.append(error)

    # A thread, and not a signal: that works on every system. A daemon does not keep the program from ending.
    thread = threading.Thread(target=grade, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        return Verdict(False, f"your code has been running for {seconds:.0f} seconds: does a loop of it never end?")
    (verdict,) = found
    if isinstance(verdict, BaseException):
        raise verdict
    return verdict


def _grade(chosen: Exercise, file: Path) -> Verdict:
    try:
        file.read_text(encoding="utf-8")
        names: dict[str, object] = runpy.run_path(str(file), run_name="answer")
    except UnicodeDecodeError:
        return Verdict(False, f"{file} is not UTF-8 text: save it in that encoding")
    except Exception as error:
        return Verdict(False, f"the file does not run: {described(error, str(file))}")
    except SystemExit:
        return Verdict(False, "the file ends the program when it is run: take exit() or sys.exit() out")
    try:
        chosen.grade(Answer(names, str(file)))
    except Wrong as wrong:
        return Verdict(False, str(wrong))
    return Verdict(True, f"{chosen.number} {chosen.title}: right")
