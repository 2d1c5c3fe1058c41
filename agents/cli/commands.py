"""The table of commands, and how one is run: its module is imported when its name is known."""

import difflib
import gc
from collections.abc import Iterable, Sequence
from importlib import import_module

COMMANDS = {
    "train": "run the whole pipeline: fine-tuning, preferences, reward model, RL, evaluation, report",
    "plan": "say what a run of `train` will cost: time, memory, disk; and whether it fits",
    "sft": "supervised fine-tuning only",
    "preferences": "sample completions and let simulated annotators compare them",
    "label": "open a page on which people compare texts; also `label stats|export|import|withdraw|rate DB`",
    "reward": "train a reward model from comparisons",
    "loop": "let people or simulated labellers compare texts, learn from it, and again",
    "evaluate": "measure a policy on held-out prompts",
    "sample": "print completions of a model",
    "chat": "talk with a chat model, line by line",
    "play": "be the policy yourself: choose among the most probable tokens",
    "step": "make one update of a run again, and walk through it: rewards, advantages, ratios, changes",
    "exercise": "exercises of the lessons: list, show, check, hint, grade a folder",
    "envs": "list the registered environments",
    "algorithms": "list the algorithms",
    "benchmark": "compare agents on a suite of tasks: table, intervals, leaderboard",
    "study": "run a study: does a paper's claim hold here?",
    "studies": "list the studies",
    "report": "write report.html for the folder of a run",
    "compare": "compare runs on one page: curves, differences with intervals, texts side by side",
    "sweep": "train with every combination of some settings and seeds, and compare",
    "check": "check an algorithm or a task of your own against its contract",
    "repeat": "run the command of a run again and compare the results",
    "merge": "write the policy of a run as one plain model folder",
    "push": "upload the policy of a run to the Hugging Face hub",
    "relocate": "after a run was moved: let its adapters name their base again",
}
"""Each command and what it does. Its module has the same name and a function `run(argv)`."""

USER_ERRORS = (ValueError, ImportError, OSError, NotImplementedError, ArithmeticError)
"""Errors that a user can correct: the command ends with their message, without a traceback."""

RECORDED = ("train", "sft", "preferences", "reward")
"""Commands that write the folder of a run, and can resume it."""


def run_command(command: str, argv: Sequence[str]) -> int:
    """Runs a command of the table; returns its exit status."""
    gc.disable()  # nothing of what an import makes is garbage: looking for it takes a third of a second
    try:
        module = import_module(f"agents.cli.{command}")
    finally:
        gc.enable()
    return module.run(argv)


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """A sentence for an error message that suggests the nearest known name; empty if none is near.

    Args:
        name: what the user gave.
        known: the names that exist.
        cutoff: how similar a name must be, from 0 to 1 (`difflib`).
    """
    by_lower_case = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), by_lower_case, 1, cutoff)
    return f" Did you mean {by_lower_case[near[0]]!r}?" if near else ""
