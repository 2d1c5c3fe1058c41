"""Cells for tests/test_experiments_runner.py: worker processes import this file, which is why it imports so little."""

import os
import random
import signal
import subprocess
import sys
import time
from typing import Any

from agents.experiments.cells import Cell


def run(cell: Cell) -> dict[str, Any]:
    """Does what the cell's config says."""
    config = cell.config
    print(f"cell {cell.index} worker {os.getpid()}", flush=True)
    time.sleep(config.get("seconds", 0.0))
    if config.get("raise"):
        raise ValueError(config["raise"])
    if config.get("exit"):
        sys.exit(config["exit"])
    if config.get("hang"):
        child = subprocess.Popen(["sleep", "600"])
        print(f"child {child.pid}", flush=True)
        time.sleep(600)
    if config.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if "return" in config:
        return {"lambda": {"f": min}, "nan": {"score": float("nan")}, "list": [1]}[config["return"]]
    return {"score": random.random(), "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}
