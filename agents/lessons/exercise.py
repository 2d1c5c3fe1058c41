"""What an exercise is, and how the functions of an answer are called and compared with an oracle."""

import linecache
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["fill", "mend"]
"""Whether the learner writes a function ("fill") or repairs a working algorithm with a bug ("mend")."""


class Wrong(Exception):
    """What is wrong with an answer, in words."""


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        number: lesson and place, such as "2.1".
        title: a few words.
        kind: "fill" or "mend".
        start: the Python file that the learner starts from; its docstring is the task.
        hints: from a nudge to nearly the line.
        grade: raises `Wrong` if the answer is not right; compares with oracles, never with a stored solution.
    """

    number: str
    title: str
    kind: Kind
    start: str
    hints: tuple[str, ...]
    grade: Callable[["Answer"], None]

    @property
    def lesson(self) -> int:
        """The number of its lesson."""
        return int(self.number.partition(".")[0])


EXERCISES: dict[str, Exercise] = {}
"""Every exercise by its number; the modules of `agents.lessons.exercises` fill it while they are imported."""


def exercise(
    number: str, title: str, kind: Kind, start: str, hints: tuple[str, ...]
) -> Callable[[Callable[["Answer"], None]], Callable[["Answer"], None]]:
    """Registers the grader below it as an exercise; the arguments are those of `Exercise`."""

    def register(grade: Callable[["Answer"], None]) -> Callable[["Answer"], None]:
        if number in EXERCISES:
            raise ValueError(f"two exercises are called {number}")
        EXERCISES[number] = Exercise(number, title, kind, start.lstrip("\n"), hints, grade)
        return grade

    return register


class Answer:
    """The functions of a learner's file: `answer.gae(...)` calls the learner's `gae`.

    A call raises `Wrong` if the function is missing, raises an error, returns nothing, or changes its arguments.
    """

    def __init__(self, names: Mapping[str, Any], file: str):
        self._names, self.file = names, file

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = self._names.get(name)
        if not callable(function):
            raise Wrong(f"the file has no function `{name}`: keep the name that the exercise gives it")

        def call(*arguments: Any) -> Any:
            before = [a.detach().clone() if isinstance(a, Tensor) else None for a in arguments]
            try:
                got = function(*arguments)
            except Exception as error:
                raise Wrong(f"`{name}` raises an error: {described(error, self.file)}") from error
            if got is None:
                raise Wrong(f"`{name}` returns nothing yet: write its body, and return the result")
            for argument, copy in zip(arguments, before, strict=True):
                if copy is not None and not torch.equal(argument.detach(), copy):
                    raise Wrong(f"`{name}` changes a tensor that it was given: work on a copy, as in x = x.clone()")
            return got

        return call


def described(error: BaseException, file: str) -> str:
    """An error in one line, with the line of the learner's file that raised it."""
    said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{said}, at line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if not lines or lines[-1] is None:
        return said
    return f"{said}, at line {lines[-1]}: {linecache.getline(file, lines[-1]).strip()}".rstrip(": ")


def expect(
    got: Any, wanted: Any, case: str, mistakes: Mapping[str, Any] | None = None, tolerance: float = 1e-5
) -> None:
    """Raises `Wrong` unless two numbers, or two arrays of numbers, are equal.

    Args:
        got: what the learner's function returned.
        wanted: what an oracle says.
        case: the input, in words that follow "for".
        mistakes: what typical wrong answers would have returned; the key says in words what is wrong with them.
        tolerance: relative and absolute.
    """
    right = torch.as_tensor(wanted, dtype=torch.float64)
    try:
        value = torch.as_tensor(got, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"for {case}, you return a {type(got).__name__}; expected {_kind(right)}") from None
    if value.shape != right.shape:
        raise Wrong(f"for {case}, you return {_kind(value)}; expected {_kind(right)}")
    if torch.allclose(value, right, tolerance, tolerance):
        return
    shown = f"For {case}, you return {shorten(value)}; expected {shorten(right)}."
    for message, mistake in (mistakes or {}).items():
        other = torch.as_tensor(mistake, dtype=torch.float64)
        if other.shape == value.shape and torch.allclose(value, other, tolerance, tolerance, equal_nan=True):
            raise Wrong(f"{message}. {shown}")
    if not bool(torch.isfinite(value).all()):
        raise Wrong(
            f"A value is infinite or not a number: look for log(0), a division by 0, or exp of a large number. {shown}"
        )
    raise Wrong(shown)


def demand(condition: bool, message: str) -> None:
    """Raises `Wrong` with the message unless the condition holds."""
    if not condition:
        raise Wrong(message)


def shorten(value: Any) -> str:
    """A number or an array as text, with four digits and at most ten entries."""
    flat = torch.as_tensor(value, dtype=torch.float64)
    if flat.ndim == 0:
        return f"{float(flat):.4g}"
    if flat.numel() > 10:
        return f"{shorten(flat.flatten()[:10])[:-1]}, …]"
    return "[" + ", ".join(shorten(row) for row in flat) + "]"


def _kind(value: Tensor) -> str:
    return "one number" if value.ndim == 0 else f"an array of shape {list(value.shape)}"


def numbers(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> Tensor:
    """Repeatable normal random numbers in double precision."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def probabilities(count: int, seed: int) -> Tensor:
    """A repeatable random distribution over `count` outcomes."""
    return numbers((count,), seed).softmax(0)


def lengths_mask(lengths: list[int], width: int) -> Tensor:
    """[B, T], True for the first `lengths[i]` tokens of row i."""
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]
