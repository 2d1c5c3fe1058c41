"""Contract tests for your own tasks, policies and algorithms.

`check_task` needs no torch; the others are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmgym.testing.task_checks import check_task

if TYPE_CHECKING:
    from lmgym.testing.algorithm_checks import Check, check_algorithm
    from lmgym.testing.policy_checks import check_policy
    from lmgym.testing.table_policy import TablePolicy

_LAZY = {
    "Check": "lmgym.testing.algorithm_checks",
    "check_algorithm": "lmgym.testing.algorithm_checks",
    "TablePolicy": "lmgym.testing.table_policy",
    "check_policy": "lmgym.testing.policy_checks",
}

__all__ = ["Check", "TablePolicy", "check_algorithm", "check_policy", "check_task"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'lmgym.testing' has no attribute {name!r}")
