"""Comparison of two runs, bit by bit: metrics, texts, weights."""

import json
from pathlib import Path

from agents.runs.files import read_rows
from lmgym.io import atomic

RESULTS = (
    "evaluation.json", "samples.jsonl", "preferences.jsonl", "preferences_test.jsonl", "preferences_noise_free.jsonl",
    "sft", "reward_model", "policy", "policy_best",
)  # fmt: skip
"""The results of a run, without what depends on when and how it was made."""


def results(folder: Path) -> dict[str, str]:
    """A digest of each result in a run's folder; the times in metrics.jsonl are ignored."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "metrics.jsonl")]
    found = {"metrics.jsonl": json.dumps(rows, sort_keys=True)}
    return found | {name: atomic.digest(folder / name) for name in RESULTS if (folder / name).exists()}


def compare(one: Path, other: Path) -> dict[str, bool]:
    """For each result of two runs, whether it is the same in both.

    Raises:
        ValueError: a folder does not hold a run.
    """
    first, second = results(one), results(other)
    return {name: first.get(name) == second.get(name) for name in {**first, **second}}
