"""Contracts to run on parts of your own, in your own tests: tasks, policies, algorithms.

`check_task` needs no torch; the others are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmgym.testing.tasks import check_task

if TYPE_CHECKING:
    from lmgym.testing.algorithms import Check, check_algorithm
    from lmgym.testing.policies import TablePolicy, check_policy

_LAZY = {
    "Check": "lmgym.testing.algorithms",
    "check_algorithm": "lmgym.testing.algorithms",
    "TablePolicy": "lmgym.testing.policies",
    "check_policy": "lmgym.testing.policies",
}

__all__ = ["Check", "TablePolicy", "check_algorithm", "check_policy", "check_task"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lmgym.testing' has no attribute {name!r}")
