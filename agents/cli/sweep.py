"""`lmgym sweep`: training with every combination of some settings, or with settings that Optuna chooses."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agents.cli import train
from agents.cli.options import importable, note, option_value, parse, without_options
from agents.cli.several_runs import check_options, finish, result_of, run_all
from agents.evaluate import METRICS
from lmgym.io import printable

OWN = {"--over": 1, "--seeds": 1, "--jobs": 1, "--trials": 1, "--metric": 1, "--out": 1}
"""The options of `lmgym sweep` that `lmgym train` does not have, or has with another meaning."""
OUT = "runs/sweep"
Seeds = dict[int, dict[str, Any]]
"""The rows of results.jsonl of one setting, by seed."""


@dataclass(frozen=True)
class Range:
    """Settings between two numbers, from which Optuna draws.

    Attributes:
        low, high: the bounds; whole numbers give whole numbers.
        log: whether the logarithm is drawn uniformly.
    """

    low: int | float
    high: int | float
    log: bool

    @classmethod
    def parse(cls, name: str, text: str) -> "Range":
        """A range such as "1e-4..1e-2:log".

        Raises:
            ValueError: it is not of this form.
        """
        bounds, _, kind = text.partition(":")
        try:
            low, high = (int(b) if b.strip().lstrip("-").isdigit() else float(b) for b in bounds.split(".."))
        except ValueError:
            low = high = math.nan
        if not low < high or not math.isfinite(high - low) or kind not in ("", "log") or (kind and low <= 0):
            raise ValueError(
                f"--over {name}={text} is no range: give LOW..HIGH with LOW < HIGH, such as 1e-4..1e-2:log, where :log "
                "draws the logarithm and needs LOW > 0"
            )
        return cls(low, high, bool(kind))


def run(argv: Sequence[str]) -> int:
    """Trains with each setting and each seed, and prints and writes what came out."""
    wanted, over = parse_options(argv)
    seeds = range(wanted.seeds)
    check_options(argv, seeds, "--seeds of a sweep")
    line = without_options(argv, OWN)
    found: dict[str, Seeds] = {}
    settings = _suggested(over, wanted, found) if wanted.trials else _combinations(over)
    batches = ([setting] for setting in settings) if wanted.trials else [list(settings)]
    for batch in batches:
        lines = {_folder(setting): [*line, *_arguments(setting)] for setting in batch}
        for own in lines.values():
            train.parse_options(own)  # refuses a wrong value before anything runs
        found |= run_all(lines, seeds, wanted, Path(wanted.out))
    ranked = sorted(found, key=lambda name: -_value(found[name], wanted.metric))
    Console().print(_table(found, ranked, wanted.metric))
    if not math.isinf(_value(found[ranked[0]], wanted.metric)):
        fresh = " ".join(str(seed) for seed in range(wanted.seeds, 2 * wanted.seeds))
        note(
            f"the best of {len(found)} settings was chosen by these figures, so its own figure is too good: to report "
            f"it, train it with other seeds (--seeds {fresh})"
        )
    finish([row for name in ranked for row in found[name].values()], Path(wanted.out))
    return 0


def parse_options(argv: Sequence[str]) -> tuple[Any, dict[str, list[str] | Range]]:
    """The options of a sweep, and the settings that are varied: lists of values, or ranges.

    Raises:
        ValueError: --over is missing or malformed, or has a range without --trials.
    """
    pairs = [_pair(text) for text in _values_of(argv, "--over")]
    over: dict[str, list[str] | Range] = {}
    for name, text in pairs:
        if name in over:
            raise ValueError(f"--over {name}=… is given twice: put all values into one, such as {name}={text},…")
        over[name] = Range.parse(name, text) if ".." in text else text.split(",")
    algorithms = over.get("algorithm")
    if algorithms and option_value(argv, "--algorithm"):
        raise ValueError("--algorithm and --over algorithm=… cannot be given together: leave one out")
    first = algorithms[0] if isinstance(algorithms, list) else option_value(argv, "--algorithm") or "ppo"
    kind, module = options_type(first)
    with importable(module):
        wanted = parse("sweep", kind, argv)
    if not over:
        raise ValueError("nothing to vary: give --over NAME=VALUE,VALUE…, such as --over ppo.lr=1e-3,2e-3")
    for name, values in over.items():
        if isinstance(values, Range) and not wanted.trials:
            raise ValueError(f"--over {name}=…: a range needs --trials N, the number of settings that Optuna tries")
        if isinstance(values, list) and (not all(values) or len(set(values)) < len(values)):
            raise ValueError(f"--over {name}={','.join(values)}: a value is empty or given twice")
    for name in ("seeds", "jobs"):
        if getattr(wanted, name) < 1:
            raise ValueError(f"--{name} {getattr(wanted, name)} must be at least 1")
    if wanted.metric not in ("auto", *METRICS):
        raise ValueError(f"--metric {wanted.metric} is unknown: choose from auto, {', '.join(METRICS)}")
    if wanted.trials < 0:
        raise ValueError(f"--trials {wanted.trials} is negative: give the number of settings to try")
    return wanted, over


def options_type(algorithm: str) -> tuple[type, Any]:
    """The options of a sweep: those of `lmgym train`, and its own; and the module of the algorithm."""
    base, module, _ = train.options_type(algorithm)
    texts = {
        "over": "NAME=VALUE,VALUE… of an option of `lmgym train`, such as ppo.lr=1e-3,2e-3, or algorithm=ppo,grpo. "
        "Repeated, all combinations are run. With --trials also a range: ppo.lr=1e-4..1e-2:log.",
        "seeds": "Number of seeds for each setting: 0, 1, ….",
        "jobs": "Number of runs at the same time, each in a process of its own.",
        "trials": "Number of settings that Optuna (pip install 'lmgym[optuna]') chooses one after the other; 0: all "
        "combinations of the given values.",
        "metric": 'Figure of the evaluation after training that ranks the settings, higher is better. "auto": the gold '
        "score if the task has one, otherwise the score.",
        "out": "Folder of all runs.",
    }

    def option(name: str, kind: Any, default: Any) -> tuple[str, Any, Any]:
        return name, Annotated[kind, tyro.conf.arg(help=texts[name])], field(default=default)

    over = (
        "over",
        Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(help=texts["over"])],
        field(default=()),
    )
    parts = [
        over, option("seeds", int, 3), option("jobs", int, 1), option("trials", int, 0), option("metric", str, "auto"),
        option("out", str, OUT),
    ]  # fmt: skip
    return make_dataclass("Sweep", parts, bases=(base,), frozen=True), module


def _values_of(argv: Sequence[str], name: str) -> list[str]:
    """All values of an option that may be repeated."""
    found = [after for option, after in itertools.pairwise(argv) if option == name]
    return found + [argument.partition("=")[2] for argument in argv if argument.startswith(f"{name}=")]


def _pair(text: str) -> tuple[str, str]:
    name, _, values = text.partition("=")
    name = name.strip().removeprefix("--").replace("_", "-")
    if not name or not values.strip():
        raise ValueError(f"--over {text!r} must be NAME=VALUE,VALUE…, such as ppo.lr=1e-3,2e-3")
    if f"--{name}" in OWN or name == "seed":
        raise ValueError(f"--over {text}: --{name} is not a setting of the training; choose another option")
    return name, values.strip()


def _combinations(over: Mapping[str, list[str] | Range]) -> Iterator[dict[str, str]]:
    """Every combination of the given values."""
    lists = [values for values in over.values() if isinstance(values, list)]
    for values in itertools.product(*lists):
        yield dict(zip(over, values, strict=True))


def _suggested(
    over: Mapping[str, list[str] | Range], wanted: Any, found: Mapping[str, Seeds]
) -> Iterator[dict[str, str]]:
    """Settings that Optuna's default sampler (TPE) chooses, each after the results of those before it.

    The study is in memory: its generator has a fixed seed, and the cells that are done are not run again, so that the
    same command makes the same choices up to where it was interrupted.
    """
    try:
        optuna = import_module("optuna")
    except ImportError as error:
        raise ImportError("--trials needs another package: pip install 'lmgym[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(wanted.trials):
        trial = study.ask()
        setting = {name: _suggest(trial, name, values) for name, values in over.items()}
        yield setting
        value = _value(found[_folder(setting)], wanted.metric)
        if math.isinf(value):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, value)


def _suggest(trial: Any, name: str, values: list[str] | Range) -> str:
    if isinstance(values, list):
        return trial.suggest_categorical(name, values)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return str(trial.suggest_int(name, values.low, values.high, log=values.log))
    return f"{trial.suggest_float(name, values.low, values.high, log=values.log):.4g}"


def _folder(setting: Mapping[str, str]) -> str:
    """The name of a setting's folder, such as "ppo.lr=1e-3,ppo.beta=0.1"; slashes in a value become "_"."""
    return ",".join(f"{name}={value}" for name, value in setting.items()).replace("/", "_").replace("\\", "_")


def _arguments(setting: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in setting.items()]


def _value(rows: Seeds, metric: str) -> float:
    """The mean of the metric over seeds; −∞ if a run failed."""
    values = [_figure(row, metric) for row in rows.values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else -math.inf


def _figure(row: Mapping[str, Any], metric: str) -> float | None:
    """A figure of a run.

    Raises:
        ValueError: the run measured others only.
    """
    if row["status"] != "ok":
        return None
    measured = row["result"]["evaluation"]["after"]
    name = ("gold" if "gold" in measured else "score") if metric == "auto" else metric
    if name not in measured:
        raise ValueError(f"--metric {name}: the runs measured {', '.join(measured)}; choose one of these")
    return result_of(row, name)


def _table(found: Mapping[str, Seeds], ranked: Sequence[str], metric: str) -> Table:
    """The settings, the best first, with the value of every seed and the KL."""
    table = Table("setting", "mean", "by seed", "KL, nats", title="higher is better")
    for name in ranked:
        rows, value = found[name].values(), _value(found[name], metric)
        figures = [_figure(row, metric) for row in rows]
        kl = [result_of(row, "kl_nats_per_sequence") for row in rows]
        known = [k for k in kl if k is not None]
        table.add_row(
            Text(printable(name)),
            "failed" if math.isinf(value) else f"{value:.3f}",
            "  ".join("failed" if f is None else f"{f:.3f}" for f in figures),
            f"{sum(known) / len(known):.2f}" if known else "–",
        )
    return table
