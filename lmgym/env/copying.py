"""Copies of environments in the middle of an episode."""

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def copy_all_but(whole: T, shared: Iterable[object], memo: dict[int, Any]) -> T:
    """A deep copy of an object that shares some of its parts; `memo` is that of `__deepcopy__`."""
    memo.update((id(part), part) for part in shared)
    memo[id(whole)] = twin = object.__new__(type(whole))
    twin.__dict__.update(copy.deepcopy(whole.__dict__, memo))
    return twin
