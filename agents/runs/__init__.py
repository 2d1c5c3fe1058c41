"""A run's folder: its files, lock, checkpoints, progress and trackers."""

from agents.runs.checkpoint import Checkpoints, Damaged, read_state, write_state
from agents.runs.files import FORMAT, check_format, read_config, read_rows
from agents.runs.folder import Run, is_finished
from agents.runs.following import FollowingRun
from agents.runs.model_card import model_card, write_cards
from agents.runs.stopping import Limits, Stopped
from agents.runs.stored import StoredRun

__all__ = [
    "FORMAT",
    "Checkpoints",
    "Damaged",
    "FollowingRun",
    "Limits",
    "Run",
    "Stopped",
    "StoredRun",
    "check_format",
    "is_finished",
    "model_card",
    "read_config",
    "read_rows",
    "read_state",
    "write_cards",
    "write_state",
]
