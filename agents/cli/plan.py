"""`lmgym plan`: what a run of `lmgym train` will cost, from small runs that are measured first."""

import gc
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, make_dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from agents.cli import train
from agents.cli.commands import USER_ERRORS
from agents.cli.folder import input_digests
from agents.cli.names import device_of
from agents.cli.options import importable, note, option_value, parse, without_options
from agents.experiments import Cell, Workers, run_cells
from agents.experiments.extrapolation import extrapolate_accuracy
from agents.pipeline import Algorithm, Setting, fine_tune, run_all, split_comparisons
from agents.pipeline.planning import Trial, accuracies_of_few, predict, predict_disk, small_run
from agents.runs import Run
from agents.runs.costs import CLOCKS, PLAN_FILE, PLAN_FORMAT, read_plan, words
from agents.runs.files import to_json
from agents.runs.folder import configuration
from agents.runs.machine import hardware
from agents.runs.meter import Meter, StageCost, memory_of_process
from agents.training import require
from agents.training.nonfinite import out_of_memory
from lmgym.devices import free_memory, return_freed_memory
from lmgym.io import atomic, first_line
from lmgym.preferences import Comparison

REFUSED = {
    "--resume": "a run that has begun shows its own progress",
    "--seeds": "plan one of the runs; the others cost the same",
    "--procs": "trials run on one process, so plan one process",
}
"""Options of `lmgym train` that cannot be planned, and why."""
OWN = {"--share": 1, "--alternatives": 0, "--no-alternatives": 0, "--plan": 1, "--out": 1}
"""Options that are not passed on to the trials, and how many values each has; and --models."""
CLEARLY = 2.0
"""Standard errors above ½ from which an accuracy is better than chance."""


@dataclass(frozen=True)
class Own:
    """The options of `lmgym plan` that `lmgym train` does not have."""

    plan: str | None = None
    """File to write the plan to. By default, "plan.json"."""
    share: float = 0.05
    """Share of the updates and steps of the run in the largest of three trials; the three have 1.75 times as many. Each
    loop has at least 3 to 5 steps."""
    alternatives: bool = True
    """Also try other settings: LoRA rank, rows, micro-batches, dtype, value function on the policy's trunk."""
    models: tuple[str, ...] = ()
    """Other language models to try, given as --model."""

    def __post_init__(self) -> None:
        require.in_range(self, "share", above=0.0, most=0.5)


def options_type(name: str) -> tuple[type, ModuleType, str]:
    """The options of a plan, the module of the algorithm, and the name of its stage."""
    base, module, stage = train.options_type(name)
    return make_dataclass("Plan", [], bases=(Own, base), frozen=True), module, stage


def run(argv: Sequence[str]) -> int:
    """Measures, predicts, prints and writes the plan; status 1 if the run does not fit this machine."""
    wanted, algorithm = parse_options(argv)
    path = Path(wanted.plan or PLAN_FILE)
    if path.exists():
        read_plan(path)  # a file that is no plan is not overwritten
    elif not path.parent.is_dir():
        raise ValueError(f"--plan {path}: there is no folder {str(path.parent)!r}: make it, or choose another file")
    console = Console()
    with tempfile.TemporaryDirectory(prefix="lmgym-plan-") as folder:
        trials = Trials(line_of_trials(argv, wanted), wanted, algorithm, Path(folder), console)
        plan = make_plan(trials)
        plan["trial_seconds"] = time.perf_counter() - trials.began
        atomic.write(path, to_json(plan))
        _show(plan, console)
        if wanted.alternatives or wanted.models:
            plan["alternatives"] = alternatives(trials, plan)
            _show_alternatives(plan, console)
            atomic.write(path, to_json(plan))
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(_verdict(plan))
    say(f"plan: {path} (trials took {words(plan['trial_seconds'])}); add --plan {path} to lmgym train")
    return 0 if plan["machine"]["fits"] else 1


def line_of_trials(argv: Sequence[str], wanted: Any) -> list[str]:
    """The command line of `lmgym train` that is planned, without its folder."""
    return without_options(argv, {**OWN, "--models": len(wanted.models)})


def parse_options(argv: Sequence[str]) -> tuple[Any, Algorithm]:
    """The options of a plan, and the algorithm.

    Raises:
        ValueError: `lmgym train` would refuse them, or they cannot be planned.
    """
    for name, reason in REFUSED.items():
        if option_value(argv, name) is not None and (name, option_value(argv, name)) != ("--procs", "1"):
            raise ValueError(f"lmgym plan takes no {name}: {reason}")
    kind, module, stage = options_type(option_value(argv, "--algorithm") or "ppo")
    with importable(module):
        wanted = parse("plan", kind, train.with_preset(argv, module, stage))
    return wanted, Algorithm(stage, module, wanted.rl.config, wanted.rl.rl)


class Trials:
    """Runs small runs in processes of their own, so that one that is killed for its memory is noticed.

    Args:
        line: the command line of `lmgym train`, without its folder.
        wanted: its options, with those of `lmgym plan`.
        algorithm: its algorithm.
        folder: of the trials; it is removed afterwards.
        console: where progress is shown.

    Attributes:
        done: the trials of the three sizes.
    """

    def __init__(self, line: Sequence[str], wanted: Any, algorithm: Algorithm, folder: Path, console: Console):
        self.line, self.wanted, self.algorithm = list(line), wanted, algorithm
        self.folder, self.console, self.began = folder, console, time.perf_counter()
        self.done: list[Trial] = []
        self._count = 0

    def run(self, indices: Sequence[int], more: Sequence[str] = (), function: str = "trial") -> list[dict[str, Any]]:
        """The results of trials, one after another in one process.

        Args:
            indices: their sizes.
            more: further arguments of the command line.
            function: in this module.

        Raises:
            ValueError: `lmgym train` refuses the options, or memory ran out.
        """
        self._count += 1
        what = ", ".join(more) or ("reward models" if function == "reward_trial" else f"{len(indices)} small runs")
        self.console.print(f"{time.perf_counter() - self.began:6.1f} s  {what}", highlight=False, markup=False)
        place = self.folder / str(self._count)
        cell = Cell(
            "plan", self.wanted.task, self.algorithm.name, 0, {"arguments": [*self.line, *more]},
            {"share": self.wanted.share, "folder": str(place), "indices": [*indices]},
        )  # fmt: skip
        threads = self.wanted.threads or torch.get_num_threads()
        row = run_cells([cell], f"agents.cli.plan:{function}", place, Workers(1, threads))[0]
        result = row["result"] or {}
        if "refused" in result:
            raise ValueError(result["refused"])
        if "memory" in result or row["status"] == "died":
            why = result.get("memory") or row["error"]
            raise ValueError(
                f"the run does not fit this machine: memory ran out in a trial ({why}). Take fewer rows, shorter "
                "completions or a smaller model"
            )
        if row["status"] != "ok":
            raise ValueError(f"a trial failed: {(row['error'].strip().splitlines() or ['no reason is known'])[-1]}")
        return result["results"]

    def measured(self, result: Mapping[str, Any], index: int) -> Trial:
        """The trial of a result."""
        given, held_out = result["given"], result["held_out"]
        small = small_run(self.wanted.options, self.algorithm, index, self.wanted.share, given, held_out)
        stages = {name: StageCost.of(stage) for name, stage in result["stages"].items()}
        return Trial(small, stages, result["comparisons"], result["disk_mb"], result["checkpoint_mb"])


def trial(cell: Cell) -> dict[str, Any]:
    """Small runs, in a worker process: what they cost, or why they were refused."""
    return _each(cell, _trial)


def reward_trial(cell: Cell) -> dict[str, Any]:
    """Accuracies of reward models that are trained on few of the given comparisons, in a worker process."""
    return _each(cell, _reward_trial)


def _each(cell: Cell, function: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """The results of all sizes of a cell; each loads its models anew."""
    import_module("agents.report")  # matplotlib takes memory in `lmgym train`, so its trials have it too
    base, argv, results = memory_of_process(), cell.config["arguments"], []
    try:
        for index in cell.setting["indices"]:
            wanted, algorithm = train.parse_options(argv)
            wanted, setting = train.setting_for(wanted, argv, algorithm)
            with tempfile.TemporaryDirectory(dir=cell.setting["folder"]) as folder:
                results.append(function(index, cell.setting["share"], folder, wanted, setting, algorithm, base))
            del setting
            gc.collect()
            return_freed_memory()
    except USER_ERRORS as error:
        return {"refused": str(error)}
    except Exception as error:
        if not out_of_memory(error):
            raise
        return {"memory": first_line(error)}
    return {"results": results}


def _given(setting: Setting) -> tuple[list[Comparison], list[Comparison]]:
    """The given comparisons to train on, and those held out."""
    if setting.comparisons is None:
        return [], []
    if setting.held_out is not None:
        return [*setting.comparisons], [*setting.held_out]
    return split_comparisons(setting.comparisons, setting.seed)


def _trial(
    index: int, share: float, folder: str, wanted: Any, setting: Setting, algorithm: Algorithm, base: float | None
) -> dict[str, Any]:
    given, held_out = _given(setting)
    counts = len(given), len(held_out)
    small = small_run(wanted.options, algorithm, index, share, *counts)
    if given:
        setting = replace(setting, comparisons=given[: small.comparisons], held_out=held_out[: small.held_out])
    options = train.options_as_data(wanted, setting, algorithm)
    with Run(folder, options, Console(quiet=True), limits=replace(wanted.limits, max_time=0.0)) as run:
        meter = run.meter = Meter(setting.lm.device, base)
        run_all(setting, small.options, small.algorithm, run)
        run.end_measurement("after")
        comparisons = small.comparisons or _lines(run.path("preferences.jsonl"))
        disk = sum(file.stat().st_size for file in run.folder.rglob("*") if _is_result(file, run.folder))
    return {
        "stages": {name: stage.as_data() for name, stage in meter.stages.items()},
        "given": counts[0], "held_out": counts[1], "comparisons": comparisons,
        "disk_mb": disk / 1e6, "checkpoint_mb": meter.checkpoint_mb, "base_mb": base,
        "options": options, "device": str(setting.lm.device),
        "threads": torch.get_num_threads(),
        "learns_reward": setting.score is None and not algorithm.learns_from_comparisons,
    }  # fmt: skip


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0


def _is_result(file: Path, folder: Path) -> bool:
    return file.is_file() and file.relative_to(folder).parts[0] != "checkpoints"


def _reward_trial(
    index: int, share: float, folder: str, wanted: Any, setting: Setting, algorithm: Algorithm, base: float | None
) -> dict[str, Any]:
    given, held_out = _given(setting)
    small = small_run(wanted.options, algorithm, index, share, len(given), len(held_out))
    with Run(folder, {}, Console(quiet=True)) as run:
        fine_tune(setting, small.options, run)
        sizes, accuracies = accuracies_of_few(setting.lm, wanted.options.reward, given, held_out, setting.seed, run)
    pairs = sum(c.pairs for c in held_out if not c.is_tie)
    return {"sizes": sizes, "accuracies": accuracies, "pairs": pairs, "comparisons": len(given)}


def make_plan(trials: Trials) -> dict[str, Any]:
    """The plan, from three trials."""
    wanted, algorithm = trials.wanted, trials.algorithm
    device = torch.device(device_of(wanted))
    free = free_memory(device)
    results = trials.run(range(3))
    last = results[-1]
    measured = trials.done = [trials.measured(result, index) for index, result in enumerate(results)]
    plan = predict(measured, wanted.options, algorithm, last["given"])
    plan["total"]["disk_mb"] = predict_disk(measured, wanted.limits.keep_checkpoints)
    out = next(
        folder for folder in (Path(wanted.out).absolute(), *Path(wanted.out).absolute().parents) if folder.exists()
    )
    plan["machine"] = {
        "device": last["device"], "hardware": hardware(last["threads"]), "threads": last["threads"],
        "base_mb": last["base_mb"] if device.type == "cpu" else 0.0,
        "free_memory_mb": None if free is None else free / 1e6,
        "free_disk_mb": shutil.disk_usage(out).free / 1e6,
    }  # fmt: skip
    plan["machine"]["fits"] = not _misfits(plan)
    plan["reward_accuracy"] = None
    if last["given"] and last["learns_reward"]:
        try:
            plan["reward_accuracy"] = reward_accuracy(trials.run([2], function="reward_trial")[0])
        except ValueError as error:
            note(f"the accuracy of the reward model is not predicted: {error}")
    about = configuration(last["options"], ["train", *trials.line], input_digests(wanted))
    about |= {"plan_format": PLAN_FORMAT, "algorithm": algorithm.name}
    return about | plan


def _misfits(plan: Mapping[str, Any]) -> list[str]:
    """What there is too little of on this machine, in words."""
    machine, total, found = plan["machine"], plan["total"], []
    peak, free = total["peak_mb"], machine["free_memory_mb"]
    if peak is not None and free is not None and machine["base_mb"] + peak["high"] > free:
        found.append(f"memory (up to {machine['base_mb'] + peak['high']:,.0f} MB, and {free:,.0f} MB are free)")
    if total["disk_mb"] > machine["free_disk_mb"]:
        found.append(f"disk space ({total['disk_mb']:,.0f} MB, and {machine['free_disk_mb']:,.0f} MB are free)")
    return found


def reward_accuracy(result: Mapping[str, Any]) -> dict[str, Any]:
    """The reward model's accuracy on the held-out comparisons after training on all comparisons, with a 90 % band.

    "at_chance": the reward models on few comparisons are no better than chance, so that the band says little.

    Raises:
        ValueError: all held-out comparisons are ties, so that there is no accuracy.
    """
    sizes, accuracies, pairs = result["sizes"], result["accuracies"], result["pairs"]
    told = extrapolate_accuracy(sizes, accuracies, result["comparisons"], pairs)
    largest = [accuracy for size, accuracy in zip(sizes, accuracies, strict=True) if size == max(sizes)]
    at_chance = sum(largest) / len(largest) <= 0.5 + CLEARLY * (0.25 / pairs) ** 0.5
    return {"value": told.value, "low": told.low, "high": told.high, "at_chance": at_chance, **result}


# Alternatives --------------------------------------------------------------------------------------------------------


def other_settings(wanted: Any, algorithm: Algorithm) -> Iterator[tuple[str, list[str]]]:
    """Other settings worth a look, in words and as arguments of the command line."""
    rl, name, config = algorithm.rl, algorithm.name, algorithm.config
    if wanted.alternatives:
        if not wanted.from_adapter:
            for rank in (max(1, rl.lora_rank // 2), 2 * rl.lora_rank):
                if rank != rl.lora_rank:
                    yield f"LoRA rank {rank}", [f"--{name}.lora-rank={rank}"]
        for rows in (rl.rows // 2, 2 * rl.rows):
            if rows:
                yield f"{rows} rows", [f"--{name}.rows={rows}"]
        rows = getattr(config, "minibatch_rows", 0) or rl.rows
        tokens = rl.micro_tokens or rows * ((wanted.max_prompt_tokens or 0) + (wanted.max_new_tokens or 32))
        yield f"passes of {max(64, tokens // 4)} tokens", [f"--{name}.micro-tokens={max(64, tokens // 4)}"]
        other = "bfloat16" if wanted.dtype == "float32" else "float32"
        yield other, [f"--dtype={other}"]
        if rl.critic in ("adapter", "network"):
            yield "value function on the policy's trunk", [f"--{name}.critic=head"]
    for model in wanted.models:
        yield f"model {model}", [f"--model={model}"]


def alternatives(trials: Trials, plan: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the run would cost with other settings: each is measured in one small run, beside that of the plan."""
    found = []
    for words_, line in other_settings(trials.wanted, trials.algorithm):
        entry: dict[str, Any] = {"setting": words_, "arguments": line}
        try:
            other = trials.measured(trials.run([1], line)[0], 1)
        except ValueError as error:
            found.append(entry | {"refused": str(error)})
            continue
        everything = not line[0].startswith(f"--{trials.algorithm.name}.")
        found.append(entry | compare_with_plan(plan, trials.done[1], other, trials.algorithm.name, everything))
    return found


def compare_with_plan(
    plan: Mapping[str, Any], base: Trial, other: Trial, algorithm: str, everything: bool
) -> dict[str, Any]:
    """Time and peak memory of the run with another setting.

    Args:
        plan: of the run as it is.
        base, other: trials of the same size, as it is and with the other setting.
        algorithm: name of its stage.
        everything: whether the setting changes all stages, and not only that of the algorithm.
    """
    seconds = dict.fromkeys(CLOCKS, 0.0)
    peaks = []
    for name, stage in plan["stages"].items():
        changed = name in other.stages and name in base.stages and (everything or name == algorithm)
        # The processor's time: that by the clock says as much about other processes.
        ratio = _typical(other.stages[name]) / _typical(base.stages[name]) if changed else 1.0
        for clock in CLOCKS:
            seconds[clock] += stage[clock]["value"] * ratio
        if stage["peak_mb"] is not None:
            more = (other.stages[name].peak_mb or 0.0) - (base.stages[name].peak_mb or 0.0) if changed else 0.0
            peaks.append(stage["peak_mb"]["value"] + more)
    return {**seconds, "peak_mb": max(peaks) if len(peaks) == len(plan["stages"]) else None}


def _typical(stage: StageCost) -> float:
    """Processor seconds of a stage: those of a step, where it has steps."""
    steps = [len(loop.seconds) * median(loop.processor_seconds) for loop in stage.loops.values()]
    return sum(steps) if steps else stage.processor_seconds


# What is printed -----------------------------------------------------------------------------------------------------


def _show(plan: Mapping[str, Any], console: Console) -> None:
    table = Table("stage", "steps", "time", "90 % band", "processor", "peak memory")
    for name, stage in plan["stages"].items():
        steps = " + ".join(f"{loop['steps']:,}" for loop in stage["loops"].values())
        table.add_row(name, steps, *_figures(stage))
    table.add_row("in all", "", *_figures(plan["total"]), style="bold")
    console.print(table)
    accuracy = plan["reward_accuracy"]
    if accuracy:
        doubt = ". Reward models on a tenth of them are no better than chance: more comparisons would tell more"
        console.print(
            f"accuracy of the reward model after all {accuracy['comparisons']:,} comparisons, on {accuracy['pairs']} "
            f"held-out pairs: {accuracy['value']:.3f}, 90 % band {accuracy['low']:.3f} to {accuracy['high']:.3f}"
            f"{doubt if accuracy['at_chance'] else ''}",
            highlight=False,
            soft_wrap=True,
        )


def _figures(part: Mapping[str, Any]) -> list[str]:
    time_, band = part["seconds"], f"{words(part['seconds']['low'])} to {words(part['seconds']['high'])}"
    return [words(time_["value"]), band, words(part["processor_seconds"]["value"]), _memory(part["peak_mb"])]


def _memory(peak: Mapping[str, float] | float | None) -> str:
    value = peak["value"] if isinstance(peak, Mapping) else peak
    return "unknown" if value is None else f"{value:,.0f} MB"


def _show_alternatives(plan: Mapping[str, Any], console: Console) -> None:
    table = Table("with another setting", "time", "processor", "peak memory", "option")
    as_planned = [plan["total"][clock]["value"] for clock in CLOCKS]
    table.add_row("as planned", *map(words, as_planned), _memory(plan["total"]["peak_mb"]), "")
    for entry in plan["alternatives"]:
        option = " ".join(entry["arguments"])
        if "refused" in entry:
            table.add_row(entry["setting"], "refused", "", entry["refused"], option)
        else:
            table.add_row(
                entry["setting"], *(words(entry[clock]) for clock in CLOCKS), _memory(entry["peak_mb"]), option
            )
    console.print(table)


def _verdict(plan: Mapping[str, Any]) -> str:
    """Whether the run fits this machine."""
    missing, machine, total = _misfits(plan), plan["machine"], plan["total"]
    if missing:
        return f"It does not fit this machine: too little {' and '.join(missing)}"
    peak, free = total["peak_mb"], machine["free_memory_mb"]
    memory = "memory unknown"
    if peak is not None and free is not None:
        memory = f"memory up to {machine['base_mb'] + peak['high']:,.0f} of {free:,.0f} MB"
    return (
        f"It fits this machine: {memory}, disk {total['disk_mb']:,.1f} of {machine['free_disk_mb']:,.0f} MB. Memory in "
        f"the table is what the run adds to the {machine['base_mb']:,.0f} MB of Python with its libraries"
    )
