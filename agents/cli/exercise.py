"""`lmgym exercise`: the exercises of the lessons, and their grader."""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from agents.cli.options import parse
from agents.lessons import all_exercises, check_file, find, number_in
from lmgym.io import encodable, printable

Action = Literal["list", "show", "check", "hint", "grade"]


@dataclass(frozen=True)
class ExerciseCommand:
    """Exercises of the lessons: list them, show one, check an answer, get a hint, grade a folder."""

    action: tyro.conf.Positional[Action] = "list"
    """"list", "show" (print the file to start from), "check" (a file), "hint", or "grade" (a folder)."""
    number: tyro.conf.Positional[str] = ""
    """Number of the exercise, such as 2.1; for "grade", a folder."""
    file: tyro.conf.Positional[str] = ""
    """Your file, for "check"."""
    to: str = ""
    """File that "show" writes, instead of printing; it must not exist."""
    step: int = 1
    """Which hint: 1 is a nudge, 3 nearly the line."""


def run(argv: Sequence[str]) -> int:
    """Does what the action says; a wrong answer gives the exit status 1."""
    wanted = parse("exercise", ExerciseCommand, argv)
    if wanted.action == "list":
        for each in all_exercises():
            print(printable(f"{each.number:5} {each.kind}  {each.title}"))
        return 0
    if wanted.action == "grade":
        return _grade(Path(wanted.number or "."))
    if not wanted.number:
        raise ValueError(f"which exercise? Give its number: `lmgym exercise {wanted.action} 2.1`")
    chosen = find(wanted.number)
    if wanted.action == "show":
        _show(chosen.start, chosen.number, wanted.to)
        return 0
    if wanted.action == "hint":
        if not 1 <= wanted.step <= len(chosen.hints):
            raise ValueError(
                f"--step is {wanted.step}: exercise {chosen.number} has the hints 1 to {len(chosen.hints)}"
            )
        print(printable(chosen.hints[wanted.step - 1]))
        return 0
    if not wanted.file:
        raise ValueError(f"which file? `lmgym exercise check {chosen.number} FILE`")
    verdict = check_file(chosen.number, wanted.file)
    print(printable(verdict.message if verdict.passed else f"not yet: {verdict.message}"))
    return 0 if verdict.passed else 1


def _grade(folder: Path) -> int:
    """Prints one line of CSV for each answer below a folder; the first line of a start names its exercise."""
    answers = [(path, number_in(path)) for path in sorted(folder.rglob("*.py"))]
    answers = [(path, number) for path, number in answers if number]
    if not answers:
        raise ValueError(
            f"no answer in {str(folder)!r}: a file keeps the first line that `lmgym exercise show` gave it"
        )
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["file", "exercise", "right", "message"])
    for path, number in answers:
        verdict = check_file(number, path)
        table.writerow([path.relative_to(folder).as_posix(), number, int(verdict.passed), printable(verdict.message)])
    return 0


def _show(start: str, number: str, to: str) -> None:
    if not to:
        print(encodable(start), end="")
        return
    file = Path(to)
    if file.exists():
        raise ValueError(f"{to} exists, and is left as it is: give --to another name")
    file.write_text(start, encoding="utf-8")
    print(printable(f"wrote {to}; when it is done: lmgym exercise check {number} {to}"))
