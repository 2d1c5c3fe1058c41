"""The arguments of an environment, checked before anything is built."""

from collections.abc import Sequence
from typing import Any, Literal

OnLimit = Literal["terminate", "truncate"]


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises a ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose from {', '.join(map(repr, choices))}")
