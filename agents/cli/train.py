"""`lmgym train`: the whole pipeline."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.table import Table
from rich.text import Text

from agents.cli.folder import input_digests, open_run, recorded, with_recorded_options
from agents.cli.names import device_of, score_named, setting_of, teacher_in
from agents.cli.options import Common, importable, last_value, option_value, parse
from agents.cli.several_runs import run_seeds
from agents.cli.starting_adapter import adapter_folder, start_from_adapter
from agents.evaluate import EvaluationReport
from agents.pipeline import Algorithm, Options, RLOptions, Setting, run_all
from agents.pipeline import load_algorithm as catalog
from agents.runs import Run
from agents.runs.costs import PLAN_FILE, PlanWatch, check_same_setting, read_plan
from agents.runs.files import to_json
from agents.runs.meter import memory_of_process
from lmgym.io import printable
from lmgym.io.redact import redact_all
from lmgym.models import check_base
from lmgym.ranks import current

STAGES = ("sft", "preferences", "query_model", "reward", "reward_model", "before")
"""Names of stages in the folder of a run, which an algorithm cannot have."""
SHOWN = 3
"""Prompts whose completions before and after training are printed."""


@dataclass(frozen=True)
class Train(Common):
    """The whole pipeline. The options of the algorithm are added under its name."""

    out: str = "runs/latest"
    """Folder of the run: new, empty, or that of an interrupted run with the same options, which then continues."""
    algorithm: str = "ppo"
    """RL algorithm; `lmgym algorithms` lists them. Your own algorithm is package.module or FILE.py. Its options are
    listed under its name."""
    preset: str = ""
    """Settings of the algorithm by a name: "tuned" are those that did best on small tasks with the same number of
    sampled tokens (docs/tuning.md). Options of your own override them."""
    preferences_file: Annotated[str | None, tyro.conf.arg(name="preferences")] = None
    """Your own comparisons instead of simulated ones: a file, a saved data set or a name on the hub, as --prompts. Rows
    have prompt, chosen and rejected, or another common form (docs/data.md)."""
    test_preferences: str | None = None
    """Held-out comparisons of your own. By default, a tenth of --preferences, drawn at random."""
    reward: str = "default"
    """Score that the policy is paid: "learned", "task", a reward model (folder or name), or a function
    ("package.module:function"; "trl:FILE.py:function" in TRL's form). "learned" trains a reward model first. "task" is
    the task's own score, or the gold score where the task has no other (Sentiment, your own prompts). By default,
    "learned" for those and "task" otherwise."""
    from_adapter: str | None = None
    """Folder of a LoRA adapter, or of a finished run, from whose policy training continues. The adapter keeps its rank;
    its base is the model (unless --model gives the same one) and the reference, and is not fine-tuned. To start from
    the adapter's policy with KL 0 instead, give its folder as --model."""
    teacher: str | None = None
    """Folder of a finished run, whose policy is the teacher of the algorithm `distill`."""
    watch: str | None = None
    """Second reward model or function, given as for --reward. It scores the rollouts, and no learner is paid by it."""
    seeds: tuple[int, ...] = ()
    """Several runs that differ in their seed: --seeds 0 1 2 makes --out/seed-0, seed-1 and seed-2, and a page that
    compares them. The same command continues after an interruption."""
    jobs: int = 1
    """With --seeds: number of runs at the same time, each in a process of its own."""
    plan: str | None = None
    """File of a plan that `lmgym plan` made for these options. The report shows what was planned beside what it took,
    and the run says when the plan was wrong."""
    track: tuple[Literal["wandb", "trackio"], ...] = ()
    """Services that also receive the metrics. By default, nothing is sent anywhere."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)


def run(argv: Sequence[str]) -> int:
    """Trains, evaluates, and writes the report."""
    argv = with_recorded_options("train", Train.out, argv)
    wanted, algorithm = parse_options(argv)
    if wanted.seeds:
        return run_seeds(wanted, argv)
    # The report needs matplotlib, which takes most of a second to import; --help-all ends above.
    from agents.report import write_report

    before = memory_of_process()
    wanted, setting = setting_for(wanted, argv, algorithm)

    def about(options: dict[str, Any]) -> dict[str, Any]:
        return recorded_options(options, setting, algorithm)

    plan = plan_of(wanted, setting, algorithm)
    with open_run("train", wanted, argv, about, wanted.track) as run:
        if plan:
            run.meter = PlanWatch(plan, algorithm.name, run, setting.lm.device, before)
        run.say(_summary(setting, algorithm))
        if setting.from_adapter:
            run.say(f"sft: none, because the adapter in {setting.from_adapter} belongs to the model as it is")
        figures = run_all(setting, wanted.options, algorithm, run)
        run.end_measurement("after")
        page = write_report(wanted.out) if run.leads else ""
        run.complete()
    _show(run, *figures)
    run.say(f"report: {page}")
    return 0


def recorded_options(options: dict[str, Any], setting: Setting, algorithm: Algorithm) -> dict[str, Any]:
    """What config.json records of the options, given as plain data: those of the algorithm are under its name."""
    own = options.pop("rl")
    for name in ("seeds", "jobs"):
        del options[name]
    stages = options["options"] | {algorithm.name: own["rl"] | own["config"]}
    return options | {"task": setting.task.name, "model": setting.lm.name, "options": stages}


def options_as_data(wanted: Any, setting: Setting, algorithm: Algorithm) -> dict[str, Any]:
    """The options of a run as they are read back from its config.json."""
    return json.loads(to_json(redact_all(recorded_options(asdict(wanted), setting, algorithm))))


def plan_of(wanted: Any, setting: Setting, algorithm: Algorithm) -> dict[str, Any] | None:
    """The plan that --plan names; of a run that continues, the one in its folder, with what it has measured.

    Raises:
        ValueError: there is no such plan, or it is that of another setting.
    """
    if wanted.plan is None:
        return None
    if current().world > 1:
        raise ValueError(f"--plan {wanted.plan}: a plan is that of one process: leave out --plan, or --procs")
    own = Path(wanted.out) / PLAN_FILE
    path = str(own) if own.is_file() and (own.parent / "config.json").is_file() else wanted.plan
    plan = read_plan(path)
    check_same_setting(plan, path, options_as_data(wanted, setting, algorithm), input_digests(wanted))
    return plan


def setting_for(wanted: Any, argv: Sequence[str], algorithm: Algorithm) -> tuple[Any, Setting]:
    """The options of a training run, completed by those of the adapter that it starts from, and its setting.

    Raises:
        ValueError: a name is unknown, or two options contradict one another.
    """
    if wanted.from_adapter:
        wanted = start_from_adapter(wanted, argv, algorithm.name)
    setting = setting_of(wanted, wanted.reward, wanted.preferences_file, test_preferences=wanted.test_preferences)
    if wanted.teacher:
        setting = replace(setting, teacher=teacher_in(wanted.teacher, wanted, algorithm.rl.temperature))
    if wanted.from_adapter:
        folder = str(adapter_folder(wanted.from_adapter))
        check_base(folder, setting.lm.model, setting.lm.name)
        setting = replace(setting, from_adapter=folder)
    if wanted.watch:
        setting = replace(setting, watch=score_named(wanted.watch, device_of(wanted)))
    return wanted, setting


def parse_options(argv: Sequence[str]) -> tuple[Any, Algorithm]:
    """The options of a training run, and its algorithm.

    Raises:
        ValueError: there is no such algorithm, or its settings are invalid or cannot be options.
    """
    name = option_value(argv, "--algorithm") or "ppo"
    kind, module, stage = options_type(name)
    try:
        with importable(module):
            wanted = parse("train", kind, with_preset(argv, module, stage))
    except NameError as error:
        raise ValueError(
            f"`Config` of the algorithm {name!r} has a type that cannot be resolved ({error}): define or import it at "
            "the top level of the module"
        ) from error
    return wanted, Algorithm(stage, module, wanted.rl.config, wanted.rl.rl)


def with_preset(argv: Sequence[str], module: ModuleType, algorithm: str) -> list[str]:
    """A command line in which the settings of `--preset` are options too; those that the user gives override them.

    Args:
        argv: the command line.
        module: the algorithm.
        algorithm: its name, as in its options.

    Raises:
        ValueError: the algorithm has no such preset.
    """
    name = last_value(argv, "--preset")
    settings = catalog.preset(module, algorithm, name) if name else {}
    options = {f"--{algorithm}.{key.replace('_', '-')}": str(value) for key, value in settings.items()}
    added = [f"{option}={value}" for option, value in options.items() if option_value(argv, option) is None]
    return [*argv, *added]


def options_type(name: str) -> tuple[type, ModuleType, str]:
    """The options with those of an algorithm, the module of the algorithm, and the name of its stage.

    Raises:
        ValueError: there is no such algorithm, or its settings cannot be options.
    """
    module = catalog.find(name)
    stage = module.__name__.rpartition(".")[2]
    chosen = _algorithm_options(module, stage, name)
    parts = [("rl", Annotated[chosen, tyro.conf.arg(name=stage)], field(default_factory=chosen))]
    return recorded(make_dataclass("Train", parts, bases=(Train,), frozen=True)), module, stage


def _algorithm_options(module: ModuleType, stage: str, name: str) -> type:
    """A dataclass with an algorithm's own settings and those of every algorithm, with the algorithm's defaults."""
    if stage in STAGES:
        raise ValueError(
            f"the algorithm {name!r} has the name of a stage of every run: rename its file. Reserved names are "
            f"{', '.join(STAGES)}"
        )
    own, common = ({f.name for f in fields(kind)} for kind in (module.Config, RLOptions))
    if own & common:
        raise ValueError(
            f"`Config` of the algorithm {name!r} has {sorted(own & common)[0]!r}, which all algorithms have already, "
            f"for policy or learner: rename it. Reserved names are {', '.join(sorted(common))}"
        )
    defaults: Mapping[str, Any] = dict(getattr(module, "DEFAULTS", {}))
    if set(defaults) - common:
        raise ValueError(
            f"`DEFAULTS` of the algorithm {name!r} sets {sorted(set(defaults) - common)[0]!r}; it can only set "
            f"{', '.join(sorted(common))}"
        )
    flat = tyro.conf.arg(name="")
    parts = [
        ("rl", Annotated[RLOptions, flat], field(default=RLOptions(**defaults))),
        ("config", Annotated[module.Config, flat], field(default_factory=module.Config)),
    ]
    return make_dataclass("AlgorithmOptions", parts, frozen=True)


def _summary(setting: Setting, algorithm: Algorithm) -> str:
    """One line about the task, the model, the machine and what the policy learns from."""
    lm = setting.lm
    millions = sum(p.numel() for p in lm.model.parameters()) / 1e6
    if setting.score is not None:
        source = f"paid by {', '.join(setting.score.names)}"
    else:
        source = (
            "learns from comparisons" if algorithm.learns_from_comparisons else "paid by a reward model, trained first"
        )
    threads = f", {torch.get_num_threads()} CPU threads" if lm.device.type == "cpu" else ""
    about = f"{millions:.2f} M parameters, {lm.device}{threads}, passes {lm.path()}"
    return f"{setting.task.name}: {lm.name} ({about}); {source}"


def _show(run: Run, before: EvaluationReport, after: EvaluationReport) -> None:
    """Prints the figures, and some completions, of the policy before and after training."""
    table = Table("held-out prompts", "before", "after")
    for name, figure in after.figures.items():
        was = before.figures[name]
        table.add_row(name, f"{was.mean:.3f} ± {was.stderr:.3f}", f"{figure.mean:.3f} ± {figure.stderr:.3f}")
    run.console.print(table)
    for was, now in list(zip(before.samples, after.samples, strict=True))[:SHOWN]:
        run.console.print(Text(printable(was["prompt"]), "bold"))
        for when, sample in (("before", was), ("after ", now)):
            shown = sample["score"] if sample["gold"] is None else sample["gold"]
            run.console.print(Text(f"  {when} ({shown:+.2f}):{printable(sample['completion'])}"))
