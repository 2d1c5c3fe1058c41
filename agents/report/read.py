"""Reads a run folder for the report. Every file is checked, because the folder may come from anybody."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from agents import evaluate, learner, reward_modelling, sft
from agents.report.values import Row, as_float, is_numeric
from lmgym.io import parse_json, quoted, read_lines
from lmgym.preferences import Comparison, read_comparisons

DEFINITIONS = {
    "sft": sft.METRICS,
    "reward_model": reward_modelling.METRICS
    | {"accuracy/noise_free": "the same on held-out comparisons, against labels without annotators' errors"},
    "evaluation": evaluate.METRICS,
}

# For any stage that scores rollouts.
ROLLOUT_DEFINITIONS = learner.METRICS | {
    "gold/mean": "gold score of the rollout's completions, which no learner sees, mean over rows"
}

OLDEST_FORMAT = 2
"""The lowest "format" of a config.json that the page can show. Runs before it have no such key."""

QUANTITIES = {"reward": "Reward", "kl": "KL", "value": "Value", "advantage": "Advantage"}
"""The quantities that a token of samples.jsonl may have, and their titles."""


@dataclass(frozen=True)
class RunData:
    """What a run folder holds.

    Attributes:
        config: config.json.
        metrics: the rows of metrics.jsonl.
        evaluation: evaluation.json; empty if the run has none.
        samples: the rows of samples.jsonl; empty if the run has none.
        scores: the rows of scores.jsonl, one for every held-out completion; empty if the run has none.
        plan: plan.json, what the run was planned to cost and what it cost; empty if the run has none.
        definitions: metrics.json, the run's own definitions of its metrics: stage -> name -> text.
        warnings: warnings.json.
        comparisons: held-out comparisons as the annotators ranked them; those of the training where none are held out.
        noise_free: comparisons of the same prompts, ranked by the gold score; empty if unknown.
    """

    config: Row
    metrics: list[Row]
    evaluation: Row
    samples: list[Row]
    definitions: dict[str, dict[str, str]]
    warnings: list[str]
    comparisons: list[Comparison]
    noise_free: list[Comparison]
    scores: list[Row] = field(default_factory=list)
    plan: Row = field(default_factory=dict)

    @property
    def stages(self) -> dict[str, list[Row]]:
        """The rows of metrics.jsonl by stage, in the order in which the stages began."""
        stages: dict[str, list[Row]] = {}
        for row in self.metrics:
            stages.setdefault(row["stage"], []).append(row)
        return stages

    @property
    def algorithm(self) -> str | None:
        """The stage of the algorithm that trained the policy; without `options.algorithm`, the last training stage."""
        training = [stage for stage in self.stages if self.is_training(stage)]
        wanted = self.option("algorithm")
        if not isinstance(wanted, str) or not wanted:
            return training[-1] if training else None
        # An algorithm may be a module or a file; its stage has the module's name.
        name = Path(wanted).stem if wanted.endswith(".py") else wanted.rpartition(".")[2]
        return name or wanted

    def option(self, *names: str) -> object:
        """A value among the options in config.json, by its path; None if there is none."""
        value: object = self.config.get("options")
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def definitions_of(self, stage: str) -> dict[str, str]:
        """Definitions of a stage's metrics, by name or by pattern. The run's own come first."""
        own = self.definitions.get(stage, {})
        has_score = any("score/mean" in row for row in self.metrics if row["stage"] == stage)
        return own | DEFINITIONS.get(stage, ROLLOUT_DEFINITIONS if has_score else {}) | own

    def is_training(self, stage: str) -> bool:
        """Whether a stage trains a model; others only sample completions or compare them."""
        return bool(self.definitions_of(stage)) or any("loss/train" in row for row in self.stages.get(stage, []))


def read_run(folder: Path) -> RunData:
    """Everything that the report shows of a run.

    Raises:
        ValueError: the folder or a required file is missing, a file is malformed, or an older version wrote the run;
            the message names the file, and the line if there is one.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run, the one that holds metrics.jsonl")
    for name in ("metrics.jsonl", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: holds no {name}; it is not a run folder, or the run failed before it started")
    metrics = read_rows(folder / "metrics.jsonl", check_metrics, appended=True)
    if not metrics:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no rows; the run ended before its first step")
    config = read_object(folder / "config.json")
    check_format(config, folder)
    evaluation, samples, scores = (folder / name for name in ("evaluation.json", "samples.jsonl", "scores.jsonl"))
    held_out = read_preferences(folder / "preferences_test.jsonl")
    return RunData(
        config=config,
        metrics=metrics,
        evaluation=read_evaluation(evaluation) if evaluation.is_file() else {},
        samples=read_rows(samples, check_sample) if samples.is_file() else [],
        definitions=read_definitions(folder / "metrics.json"),
        warnings=read_warnings(folder / "warnings.json"),
        comparisons=held_out or read_preferences(folder / "preferences.jsonl"),
        noise_free=read_preferences(folder / "preferences_noise_free.jsonl") if held_out else [],
        scores=read_rows(scores, check_scores) if scores.is_file() else [],
        plan=read_plan(folder / "plan.json"),
    )


def check_format(config: Row, folder: Path) -> None:
    """Refuses the run of an older version: its metrics have names under which the page would not show them.

    Raises:
        ValueError: config.json has no "format", or one below `OLDEST_FORMAT`.
    """
    found = as_float(config.get("format"))
    if found is None or found < OLDEST_FORMAT:
        revision = config.get("revision")
        wrote = f" (revision {quoted(revision)})" if isinstance(revision, str) else ""
        raise ValueError(
            f"{folder}: an older version of lmgym wrote this run; make its report with that version{wrote}"
        )


def read_preferences(path: Path) -> list[Comparison]:
    """The comparisons in a file; none if the file is missing or empty."""
    return read_comparisons(path, as_written=True) if path.is_file() and path.stat().st_size else []


def read_warnings(path: Path) -> list[str]:
    """The texts in warnings.json; anything else in the file is ignored."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def read_definitions(path: Path) -> dict[str, dict[str, str]]:
    """The definitions in metrics.json; anything else in the file is ignored, so that the run still gets a page."""
    try:
        stages = read_object(path)
    except (OSError, ValueError):
        return {}
    return {
        stage: {name: text for name, text in metrics.items() if isinstance(text, str)}
        for stage, metrics in stages.items()
        if isinstance(metrics, dict)
    }


def read_plan(path: Path) -> Row:
    """The plan; empty if the file is missing or damaged, so that the run still gets a page."""
    try:
        plan = read_object(path)
    except (OSError, ValueError):
        return {}
    return plan if isinstance(plan.get("total"), dict) else {}


def read_rows(path: Path, check: Callable[[Row], str | None], appended: bool = False) -> list[Row]:
    """Rows of a JSON Lines file. Unlike `read_jsonl`, it accepts NaN and Infinity: a diverged run holds them.

    Args:
        path: the file.
        check: says what is wrong with a row, or None.
        appended: the file is appended to, so the last line may be one that a killed run did not finish; skip it.
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


def check_scores(row: Row) -> str | None:
    """What is wrong with a row of scores.jsonl, or None."""
    if row.get("when") not in ("before", "after"):
        return '\'when\' must be "before" or "after"'
    numbers = (value for name, value in row.items() if name != "when")
    return None if all(map(is_numeric, numbers)) else "all fields but 'when' must be numbers or null"


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
