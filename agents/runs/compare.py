"""Comparison of two runs, bit by bit: metrics, texts, weights."""

import hashlib
import json
from pathlib import Path

from agents.runs.files import read_rows
from lmgym.io import atomic

RESULTS = (
    "evaluation.json", "samples.jsonl", "scores.jsonl", "preferences.jsonl", "preferences_test.jsonl",
    "preferences_noise_free.jsonl", "sft", "reward_model", "policy", "policy_best",
)  # fmt: skip
"""The results of a run, without what depends on when and how it was made."""


def results(folder: Path) -> dict[str, str]:
    """A digest of each result in a run's folder; the times in metrics.jsonl are ignored."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_rows(folder / "metrics.jsonl")]
    found = {"metrics.jsonl": json.dumps(rows, sort_keys=True)}
    return found | {name: _digest(folder / name) for name in RESULTS if (folder / name).exists()}


def _digest(path: Path) -> str:
    """A digest of a file or folder that does not depend on where the run lies: no model cards, no paths of a base."""
    if path.is_file():
        return atomic.digest(path)
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "README.md"):
        digest = atomic.digest(file)
        if file.name == "adapter_config.json":
            settings = json.loads(file.read_bytes()) | {"base_model_name_or_path": None}
            digest = json.dumps(settings, sort_keys=True)
        whole.update(f"{file.relative_to(path).as_posix()}\0{digest}\n".encode())
    return whole.hexdigest()


def compare(one: Path, other: Path) -> dict[str, bool]:
    """For each result of two runs, whether it is the same in both.

    Raises:
        ValueError: a folder does not hold a run.
    """
    first, second = results(one), results(other)
    return {name: first.get(name) == second.get(name) for name in {**first, **second}}
