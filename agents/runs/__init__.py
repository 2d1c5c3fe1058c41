"""A run's folder: its files, lock, checkpoints, progress and trackers."""

from agents.runs.checkpoint import Checkpoints, Damaged, read_state, write_state
from agents.runs.folder import Limits, Run, Stopped, read_config, read_rows

__all__ = [
    "Checkpoints",
    "Damaged",
    "Limits",
    "Run",
    "Stopped",
    "read_config",
    "read_rows",
    "read_state",
    "write_state",
]
