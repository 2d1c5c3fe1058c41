"""What belongs to an exercise and is not shown to learners."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """The key to one exercise.

    Attributes:
        fix: (old, new) pairs that turn the start into the solution.
        start: a part of the message for the untouched start.
        wrong: typical wrong answers: (old, new, a part of the message), a change of the solution.
        hidden: planted bugs that learners do not see: (old, new), a change of the solution.
    """

    fix: tuple[tuple[str, str], ...]
    start: str
    wrong: tuple[tuple[str, str, str], ...] = ()
    hidden: tuple[tuple[str, str], ...] = ()


EMPTY = "returns nothing yet"


def body(code: str) -> tuple[tuple[str, str], ...]:
    """The fix that fills in the body of a function."""
    lines = "\n".join(f"    {line}" if line else "" for line in code.strip("\n").splitlines())
    return (("    ...\n", lines + "\n"),)
