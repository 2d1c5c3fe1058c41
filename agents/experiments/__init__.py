"""Experiments of many runs: keyed cells, their runner, and the statistics of a suite (`agents.experiments.statistics`).

Everything is imported when it is first used: a worker process imports this package, and should start fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.experiments.cells import Cell, Shard
    from agents.experiments.results import merge_results, read_results
    from agents.experiments.runner import Progress, Workers, run_cells

_LAZY = {
    "Cell": "cells",
    "Shard": "cells",
    "merge_results": "results",
    "read_results": "results",
    "Progress": "runner",
    "Workers": "runner",
    "run_cells": "runner",
}

__all__ = ["Cell", "Progress", "Shard", "Workers", "merge_results", "read_results", "run_cells"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"agents.experiments.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'agents.experiments' has no attribute {name!r}")
