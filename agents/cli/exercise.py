"""`lmgym exercise`: the exercises of the lessons, and their grader."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from agents.cli.options import parse
from agents.lessons import all_exercises, check_file, find
from lmgym.io import encodable, printable

Action = Literal["list", "show", "check", "hint"]


@dataclass(frozen=True)
class ExerciseCommand:
    """Exercises of the lessons: list them, show one, check an answer, get a hint."""

    action: tyro.conf.Positional[Action] = "list"
    """What to do: "list", "show" (print the file to start from), "check" (grade a file), or "hint"."""
    number: tyro.conf.Positional[str] = ""
    """Number of the exercise, such as 2.1."""
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


def _show(start: str, number: str, to: str) -> None:
    if not to:
        print(encodable(start), end="")
        return
    file = Path(to)
    if file.exists():
        raise ValueError(f"{to} exists, and is left as it is: give --to another name")
    file.write_text(start, encoding="utf-8")
    print(printable(f"wrote {to}; when it is done: lmgym exercise check {number} {to}"))
