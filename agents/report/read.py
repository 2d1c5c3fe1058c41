"""Reading a run's folder for the report; every file is checked, because a folder may come from anywhere."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agents import evaluate, learner, reward_modelling, sft
from lmgym.io import parse_json, quoted, read_lines

Row = dict[str, Any]


DEFINITIONS = {
    "sft": sft.METRICS,
    "reward_model": reward_modelling.METRICS
    | {"accuracy/noise_free": "the same on held-out comparisons, against labels without annotators' errors"},
    "evaluation": evaluate.METRICS,
}


# Of any stage that scores rollouts.
ROLLOUT_DEFINITIONS = learner.METRICS | {
    "gold/mean": "gold score of the rollout's completions, which no learner sees, mean over rows"
}


@dataclass(frozen=True)
class RunData:
    """A run folder, read."""

    config: Row
    metrics: list[Row]
    evaluation: Row
    """Empty if the run has none."""
    samples: list[Row]
    """Empty if the run has none."""
    definitions: dict[str, dict[str, str]]
    """What the run itself says of the metrics of a stage."""
    warnings: list[str]
    """What it warned of."""

    def meanings(self, stage: str) -> dict[str, str]:
        """Definitions of a stage's metrics, by name or by pattern; the run's own come first."""
        own = self.definitions.get(stage, {})
        scored = any(row["stage"] == stage and "score/mean" in row for row in self.metrics)
        return own | DEFINITIONS.get(stage, ROLLOUT_DEFINITIONS if scored else {}) | own


def read_run(folder: Path) -> RunData:
    """Everything in a run's folder that the report shows."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run, the one that holds metrics.jsonl")
    for name in ("metrics.jsonl", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: holds no {name}, so it is no run folder, or the run ended before it began")
    metrics = read_rows(folder / "metrics.jsonl", check_metrics, appended=True)
    if not metrics:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no rows; the run ended before its first step")
    evaluation, samples = folder / "evaluation.json", folder / "samples.jsonl"
    return RunData(
        config=read_object(folder / "config.json"),
        metrics=metrics,
        evaluation=read_evaluation(evaluation) if evaluation.is_file() else {},
        samples=read_rows(samples, check_sample) if samples.is_file() else [],
        definitions=read_definitions(folder / "metrics.json"),
        warnings=read_warnings(folder / "warnings.json"),
    )


def read_warnings(path: Path) -> list[str]:
    """What is of the right shape, as with definitions."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def read_definitions(path: Path) -> dict[str, dict[str, str]]:
    """What is of the right shape: a run is worth a page whatever its definitions."""
    try:
        stages = read_object(path)
    except (OSError, ValueError):
        return {}
    return {
        stage: {name: text for name, text in metrics.items() if isinstance(text, str)}
        for stage, metrics in stages.items()
        if isinstance(metrics, dict)
    }


def read_rows(path: Path, check: Callable[[Row], str | None], appended: bool = False) -> list[Row]:
    """Rows of a JSON Lines file. Unlike `read_jsonl`, NaN and Infinity are let through: a diverged run holds them.

    Where lines are `appended`, the last may be one that a killed run did not finish, and is left out.
    """
    rows, lines = [], read_lines(path)
    for number, line in lines:
        try:
            row = parse_json(line)
        except ValueError as error:
            if appended and number == lines[-1][0] and not path.read_bytes().endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error}); is the line cut short?") from error
        complaint = check(row) if isinstance(row, dict) else f"not an object but {type(row).__name__}"
        if complaint:
            raise ValueError(f"{path}, line {number}: {complaint}")
        rows.append(row)
    return rows


def check_metrics(row: Row) -> str | None:
    """What is wrong with a row of metrics.jsonl, or None."""
    if not isinstance(row.get("stage"), str):
        return "lacks 'stage', the name of a stage such as \"ppo\""
    if as_float(row.get("step")) is None:
        return "lacks 'step', a number"
    wrong = [name for name, value in row.items() if name != "stage" and not is_numeric(value)]
    return f"{quoted(wrong[0])} is {quoted(row[wrong[0]])}, not a number or null" if wrong else None


def check_sample(row: Row) -> str | None:
    """What is wrong with a row of samples.jsonl, or None."""
    if row.get("when") not in ("before", "after"):
        return '\'when\' must be "before" or "after"'
    if not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
        return "'prompt' and 'completion' must be strings"
    tokens = row.get("tokens", [])
    if not (isinstance(tokens, list) and all(isinstance(t, dict) and isinstance(t.get("text"), str) for t in tokens)):
        return "'tokens' must be a list of objects, each with its 'text'"
    numbers = [row.get("score"), row.get("gold"), *(token.get(name) for token in tokens for name in QUANTITIES)]
    return None if all(map(is_numeric, numbers)) else "scores and quantities of tokens must be numbers or null"


def read_object(path: Path) -> Row:
    """A JSON file that must hold an object."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not an object but {type(value).__name__}")
    return value


def read_evaluation(path: Path) -> Row:
    """evaluation.json, checked."""
    evaluation = read_object(path)
    for when in ("before", "after"):
        metrics = evaluation.get(when, {})
        if not (isinstance(metrics, dict) and all(isinstance(value, dict | None) for value in metrics.values())):
            raise ValueError(f'{path}: {when!r} must be like {{"gold": {{"mean": 1.0, "stderr": 0.1}}}}')
    return evaluation


def is_numeric(value: object) -> bool:
    """Whether a value is a number and not a bool."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def as_float(value: object) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer beyond the floats
        return None
    return number if math.isfinite(number) else None


QUANTITIES = {"reward": "Reward", "kl": "KL", "value": "Value", "advantage": "Advantage"}
