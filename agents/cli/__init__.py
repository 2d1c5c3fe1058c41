"""The command line: `lmgym COMMAND ...`. The only module that turns names into objects.

Nothing heavy is imported before a command is known, so that `lmgym --help` answers at once.
"""

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import tyro

from lmgym.io.redact import HIDDEN

if TYPE_CHECKING:
    from types import ModuleType

    from agents.pipeline import Setting
    from agents.runs import Run
    from lmgym.models import LanguageModel
    from lmgym.policy import Policy
    from lmgym.reward import Score
    from lmgym.tasks.base import ScoreFunction, Task

COMMANDS = {
    "train": "the whole job: fine-tuning, preferences, reward model, RL, evaluation, report",
    "sft": "supervised fine-tuning alone",
    "preferences": "sample completions and have simulated annotators compare them",
    "reward": "train a reward model from comparisons",
    "evaluate": "measure a policy on held-out prompts",
    "sample": "print what a model writes",
    "envs": "list the registered environments",
    "algorithms": "list the algorithms",
    "report": "write report.html for the folder of a run",
    "repeat": "run a run's command again and compare the results",
}

STAGES = ("sft", "preferences", "reward", "reward_model", "before")
"""Names in a run that are not an algorithm's."""
MOST_THREADS = 1024
"""More than any machine has use for; with very many, torch crashes."""
SMALL = 5_000_000
"""Models of fewer parameters are fastest on one thread."""


@dataclass(frozen=True)
class Common:
    """What every stage needs to know."""

    task: tyro.conf.Positional[str] = "Sentiment"
    """A registered environment ("Sentiment", "lmgym/Sort-v0", ...); `lmgym envs` lists them."""
    model: str = ""
    """"tiny", "probe", a folder, or a name on the Hugging Face hub; the environment's own by default."""
    pad_token: str | None = None
    """Overrides the tokenizer's padding token; added to the vocabulary if it is new."""
    prompts: str | None = None
    """Prompts of your own instead of the task's: FILE.jsonl (field "prompt", or "text" with --opening-words), FILE.txt
    (one a line), or the name of a dataset."""
    opening_words: int | None = None
    """Rows of --prompts hold whole texts: this many first words are the prompt, the rest is a demonstration."""
    gold: str | None = None
    """The gold score of your own prompts, "package.module:function" or "FILE.py:function"."""
    max_prompt_tokens: int | None = None
    """P; longer prompts are refused (see --long-prompts)."""
    max_new_tokens: int | None = None
    """T, the token budget."""
    long_prompts: Literal["error", "truncate"] = "error"
    """"truncate" keeps the last tokens of prompts that are too long."""
    missing_eos_score: float | Literal["task", "none"] = "task"
    """The score of completions that reach the budget; "task" is the task's rule, "none" scores their text."""
    seed: int = 0
    """Of everything that is random."""
    device: str = "auto"
    """"cpu", "cuda", or "auto": CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights; log-probabilities are float32 in any case."""
    threads: int = 0
    """torch's CPU threads; 0 is one for models below five million parameters, else one for each core that is idle. On
    an idle machine more are faster for small models too, but where another process uses a core, two threads on two
    cores are many times slower than one."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 for anything that the user can mend, after one line that says how."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] == "--version":
        from lmgym import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        print(f"lmgym: no command {argv[0]!r}.{hint} `lmgym --help` lists them.", file=sys.stderr)
        return 2
    try:
        return _COMMANDS[argv[0]](argv[1:]) or 0
    except (ValueError, ImportError, OSError, NotImplementedError, ArithmeticError) as error:
        print(f"lmgym: {_plain_text(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print("lmgym: stopped at once", file=sys.stderr)
        return error.args[0] if error.args else 130  # a run says which signal it was
    except Exception as error:
        from agents.runs import Stopped
        from agents.training.nonfinite import out_of_memory

        if not (isinstance(error, Stopped) or out_of_memory(error)):
            raise
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if not isinstance(error, Stopped) and not said.startswith("memory ran out"):
            said = f"memory ran out ({said}): take fewer or shorter completions, or a smaller model"
        print(f"lmgym: {_plain_text(said)}", file=sys.stderr)
        return error.status if isinstance(error, Stopped) else 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()]
    first = "lmgym COMMAND ...: reinforcement learning on small language models"
    return "\n".join([first, "", *lines, "", "lmgym COMMAND --help lists the options of a command."])


def _parse(command: str, kind: Any, argv: Sequence[str]) -> Any:
    def parse(line: Sequence[str]) -> Any:
        return tyro.cli(kind, prog=f"lmgym {command}", description=COMMANDS[command], args=list(line))

    shown = [_plain_text(argument) for argument in argv]
    if shown != list(argv):
        parse(shown)  # tyro's complaints quote the line: here they do it without what a terminal would obey
    return parse(argv)


# Commands ----------------------------------------------------------------------------------------------------------


def _train(argv: Sequence[str]) -> int:
    from rich.table import Table
    from rich.text import Text

    from agents.pipeline import Algorithm, Options, catalog, run_all
    from agents.report import write_report

    argv = _taken_up("train", "runs/latest", argv)
    name = _option(argv, "--algorithm") or "ppo"
    module = catalog.find(name)
    stage = module.__name__.rpartition(".")[2]
    chosen = _algorithm_options(module, name)

    @dataclass(frozen=True)
    class Train(Common):
        """The whole job."""

        out: str = "runs/latest"
        """The run's folder: new, empty, or that of an interrupted run with the same options, which then goes on."""
        algorithm: str = "ppo"
        """The RL algorithm: `lmgym algorithms` lists them; one of your own is package.module or FILE.py. Its options
        are listed under its name."""
        preferences_file: Annotated[str | None, tyro.conf.arg(name="preferences")] = None
        """Comparisons of your own (JSONL: prompt, chosen, rejected; or prompt, ranking) instead of simulated ones."""
        reward: str = "default"
        """"learned" trains a reward model; "task" pays the task's own score; else a reward model (folder or name) or a
        function ("package.module:function"). By default, what the environment needs."""
        teacher: str | None = None
        """The folder of a finished run, whose policy is the teacher of `distill`."""
        watch: str | None = None
        """A second reward model or function, as for --reward, that judges the rollouts and pays no learner."""
        track: tuple[Literal["wandb", "trackio"], ...] = ()
        """Services to send metrics to as well. Nothing is sent anywhere by default."""
        options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)

    parts = [("rl", Annotated[chosen, tyro.conf.arg(name=stage)], field(default_factory=chosen))]
    wanted = _parse("train", _recorded(make_dataclass("Train", parts, bases=(Train,), frozen=True)), argv)
    algorithm = Algorithm(stage, module, wanted.rl.config, wanted.rl.rl)
    setting = _setting(wanted, wanted.reward, wanted.preferences_file)
    if wanted.teacher:
        setting = replace(setting, teacher=_teacher(wanted.teacher, wanted, algorithm.rl.temperature))
    if wanted.watch:
        setting = replace(setting, watch=_score(wanted.watch))
    about = {**_plain(wanted), "task": setting.task.name, "model": setting.lm.name}
    own = about.pop("rl")
    about["options"] |= {stage: own["rl"] | own["config"]}
    with _run("train", wanted, argv, about, wanted.track) as run:
        run.say(_about(setting))
        before, after = run_all(setting, wanted.options, algorithm, run)
        page = write_report(wanted.out)
        run.complete()
    table = Table("held-out prompts", "before", "after")
    for name, figure in after.figures.items():
        was = before.figures[name]
        table.add_row(name, f"{was.mean:.3f} ± {was.stderr:.3f}", f"{figure.mean:.3f} ± {figure.stderr:.3f}")
    run.console.print(table)
    for was, now in list(zip(before.samples, after.samples, strict=True))[:3]:
        run.console.print(Text(_plain_text(was["prompt"]), "bold"))
        for when, sample in (("before", was), ("after ", now)):
            shown = sample["score"] if sample["gold"] is None else sample["gold"]
            run.console.print(Text(f"  {when} ({shown:+.2f}):{_plain_text(sample['completion'])}"))
    run.say(f"report: {page}")
    return 0


def _option(argv: Sequence[str], name: str) -> str | None:
    """The value of an option that decides which other options there are."""
    for i, argument in enumerate(argv):
        if argument == name and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None


def _algorithm_options(module: "ModuleType", name: str) -> type:
    """A dataclass of an algorithm's own settings and of those that every algorithm runs with, with its defaults."""
    from agents.pipeline import RLOptions

    stage = module.__name__.rpartition(".")[2]
    if stage in STAGES:
        raise ValueError(
            f"the algorithm {name!r} is called as a stage of every run is, and would be taken for it: rename its file "
            f"to something else than {', '.join(STAGES)}"
        )
    own, common = ({f.name for f in fields(kind)} for kind in (module.Config, RLOptions))
    if own & common:
        raise ValueError(
            f"`Config` of the algorithm {name!r} has {sorted(own & common)[0]!r}, which all algorithms have already, "
            f"for policy or learner: rename it. Taken are {', '.join(sorted(common))}"
        )
    defaults = dict(getattr(module, "DEFAULTS", {}))
    if set(defaults) - common:
        raise ValueError(
            f"`DEFAULTS` of the algorithm {name!r} sets {sorted(set(defaults) - common)[0]!r}, which is none of "
            f"{', '.join(sorted(common))}"
        )
    flat = tyro.conf.arg(name="")
    parts = [
        ("rl", Annotated[RLOptions, flat], field(default=RLOptions(**defaults))),
        ("config", Annotated[module.Config, flat], field(default_factory=module.Config)),
    ]
    return make_dataclass("AlgorithmOptions", parts, frozen=True)


def _sft(argv: Sequence[str]) -> int:
    from agents.pipeline import Options, SFTOptions, fine_tune

    @dataclass(frozen=True)
    class SFT(Common):
        """Supervised fine-tuning."""

        out: str = "runs/sft"
        """The run's folder, as in `lmgym train`. The model is saved in its folder `sft`."""
        sft: Annotated[SFTOptions, tyro.conf.arg(name="")] = field(default_factory=SFTOptions)

    argv = _taken_up("sft", SFT.out, argv)
    wanted = _parse("sft", _recorded(SFT), argv)
    setting = _setting(wanted, "task", scored=False)
    with _run("sft", wanted, argv) as run:
        fine_tune(setting, Options(sft=wanted.sft), run)
        run.complete()
        run.say(f"model: {run.path('sft')}")
    return 0


def _preferences(argv: Sequence[str]) -> int:
    from agents.pipeline import Options, PreferenceOptions, gather_preferences

    @dataclass(frozen=True)
    class Preferences(Common):
        """Comparisons by simulated annotators of the task's gold score."""

        out: str = "runs/preferences"
        """The run's folder, as in `lmgym train`."""
        preferences: PreferenceOptions = field(default_factory=PreferenceOptions)

    argv = _taken_up("preferences", Preferences.out, argv)
    wanted = _parse("preferences", _recorded(Preferences), argv)
    setting = _setting(wanted, "task")
    with _run("preferences", wanted, argv) as run:
        gather_preferences(setting, Options(preferences=wanted.preferences), run)
        run.complete()
        run.say(f"comparisons: {run.path('preferences.jsonl')}, held out: {run.path('preferences_test.jsonl')}")
    return 0


def _reward(argv: Sequence[str]) -> int:
    from agents.pipeline import RewardOptions, split_comparisons, train_reward_model
    from agents.reward_modelling import normalise
    from lmgym.preferences import read_comparisons

    @dataclass(frozen=True)
    class Reward:
        """Train a reward model from comparisons."""

        preferences: str
        """JSONL with prompt, chosen, rejected; or prompt, ranking."""
        test_preferences: str | None = None
        """Held-out comparisons; by default a tenth of --preferences, drawn at random."""
        model: str = "tiny"
        """The language model to start from: "tiny", a folder, or a name on the hub."""
        pad_token: str | None = None
        """Overrides the tokenizer's padding token."""
        out: str = "runs/reward"
        """The run's folder, as in `lmgym train`. The model is saved in its folder `reward_model`."""
        seed: int = 0
        """Of everything that is random."""
        device: str = "auto"
        """"cpu", "cuda", or "auto"."""
        threads: int = 0
        """torch's CPU threads, as in `lmgym train`."""
        dtype: Literal["float32", "bfloat16"] = "float32"
        """Of the weights."""
        options: Annotated[RewardOptions, tyro.conf.arg(name="")] = field(default_factory=RewardOptions)

    argv = _taken_up("reward", Reward.out, argv)
    wanted = _parse("reward", _recorded(Reward), argv)
    comparisons = read_comparisons(wanted.preferences)
    if wanted.test_preferences:
        held_out = read_comparisons(wanted.test_preferences)
    else:
        comparisons, held_out = split_comparisons(comparisons, wanted.seed)
    lm = _load(wanted.model, wanted)
    with _run("reward", wanted, argv) as run:
        model, _ = train_reward_model(lm, wanted.options, wanted.seed, run, "stop", comparisons, held_out)
        texts = [c.prompt + text for c in comparisons for text in c.ranked]
        normalise(model, texts[: wanted.options.normalise_on])
        run.write_folder("reward_model", model.save)
        run.complete()
        run.say(f"reward model: {run.path('reward_model')}")
    return 0


def _evaluate(argv: Sequence[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from agents.evaluate import METRICS, evaluate

    @dataclass(frozen=True)
    class Evaluate(Common):
        """Measure a policy on held-out prompts."""

        policy: str | None = None
        """The folder of an adapter, on the base model that it was trained on (--model); none measures the model."""
        reward: str = "default"
        """The reward model or function that gives the score, as in `lmgym train`."""
        temperature: float = 1.0
        """Of the policy."""
        count: int = 256
        """Held-out prompts."""

    wanted = _parse("evaluate", Evaluate, argv)
    if wanted.reward == "learned":
        raise ValueError(
            "evaluate trains nothing: give --reward the folder of a reward model, such as RUN/reward_model"
        )
    setting = _setting(wanted, wanted.reward)
    lm = setting.lm
    policy = _policy(lm, wanted.policy, wanted.temperature)
    score = setting.score or _default_score(wanted, setting)
    kl = "sampled" if wanted.policy else "none"  # without an adapter the model is the reference itself
    env = setting.env(wanted.count, "test", kl=kl, temperature=wanted.temperature, score=score)
    report = evaluate(policy, env, wanted.seed)
    table = Table("measure", "mean", "± s.e.", "what it is")
    for name, figure in report.figures.items():
        table.add_row(name, f"{figure.mean:.4f}", f"{figure.stderr:.4f}", METRICS[name])
    Console().print(table)
    return 0


def _sample(argv: Sequence[str]) -> int:
    from lmgym.rollout import RolloutBuffer, Stream, decode

    @dataclass(frozen=True)
    class Sample(Common):
        """Print what a model writes."""

        policy: str | None = None
        """The folder of an adapter, on the base model that it was trained on (--model)."""
        temperature: float = 1.0
        """Lower is tamer."""
        count: int = 5
        """Completions."""
        prompt: str | None = None
        """A text to continue, instead of the task's prompts."""

    wanted = _parse("sample", Sample, argv)
    setting = _setting(wanted, "task", scored=False)
    lm = setting.lm
    policy = _policy(lm, wanted.policy, wanted.temperature)
    env = setting.env(
        wanted.count, "test", kl="none", temperature=wanted.temperature, score=lambda p, c: [0.0] * len(c)
    )
    prompts = [wanted.prompt] * wanted.count if wanted.prompt is not None else None
    decode(policy, env, RolloutBuffer.like(env), Stream(wanted.seed, 0), prompts)
    for prompt, completion in zip(env.prompts, env.completions(), strict=True):
        end = "" if completion.finish_reason == "stop" else " …"
        print(f"{_plain_text(prompt.text)}|{_plain_text(completion.text)}{end}")
    return 0


def _envs(argv: Sequence[str]) -> int:
    from lmgym.registry import TASK_SPECS

    @dataclass(frozen=True)
    class Envs:
        """List the registered environments."""

    _parse("envs", Envs, argv)
    width = max(map(len, TASK_SPECS))
    for entry in TASK_SPECS.values():
        print(_plain_text(f"{entry.id:{width}}  {entry.summary} (model {entry.model})"))
    return 0


def _algorithms(argv: Sequence[str]) -> int:
    from agents.pipeline.catalog import available, summary

    @dataclass(frozen=True)
    class Algorithms:
        """List the algorithms, for `lmgym train --algorithm NAME`."""

    _parse("algorithms", Algorithms, argv)
    known = available()
    width = max(map(len, known))
    for name, module in known.items():
        print(_plain_text(f"{name:{width}}  {summary(module)}"))
    return 0


def _report(argv: Sequence[str]) -> int:
    from agents.report import write_report

    @dataclass(frozen=True)
    class Report:
        """Write report.html for the folder of a run."""

        runs: tyro.conf.Positional[tuple[str, ...]]
        """Folders of runs."""

    runs = _parse("report", Report, argv).runs
    if not runs:
        raise ValueError("no run to report on: give the folder of one, such as runs/latest")
    for folder in runs:
        print(_plain_text(str(write_report(folder))))
    return 0


def _repeat(argv: Sequence[str]) -> int:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from agents.runs import read_config
    from agents.runs.compare import compare
    from agents.runs.machine import revision, versions

    @dataclass(frozen=True)
    class Repeat:
        """Run a run's command again and compare the results, bit by bit."""

        run: tyro.conf.Positional[str]
        """The folder of a finished run."""
        out: str | None = None
        """Where it is repeated; by default the run's folder with "-repeat" behind it."""

    wanted = _parse("repeat", Repeat, argv)
    config = read_config(Path(wanted.run))
    folder = os.path.normpath(wanted.run)
    if os.path.basename(folder) in (".", ".."):  # nothing can be put behind these
        folder = os.path.abspath(folder)
    out = wanted.out or f"{folder}-repeat"
    here = {"revision": revision(), **versions()}
    kept = config.get("versions")
    there = {"revision": config.get("revision"), **(kept if isinstance(kept, dict) else {})}
    for name, value in here.items():
        if there.get(name) != value:
            print(
                f"lmgym: {name} was {there.get(name)} then and is {value} now: the results may differ", file=sys.stderr
            )
    command, *rest = _arguments_of(wanted.run, config)
    status = _COMMANDS[command]([*rest, f"--out={out}", f"--threads={_threads_of(config)}", "--max-time=0"])
    if status:
        return status
    found = compare(Path(wanted.run), Path(out))
    table = Table("what", "the same")
    for name, same in found.items():
        table.add_row(name, "yes" if same else "no")
    Console().print(table)
    return 0 if all(found.values()) else 1


_COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "sft": _sft,
    "preferences": _preferences,
    "reward": _reward,
    "evaluate": _evaluate,
    "sample": _sample,
    "envs": _envs,
    "algorithms": _algorithms,
    "report": _report,
    "repeat": _repeat,
}


# The folder of a run -----------------------------------------------------------------------------------------------


def _recorded(kind: type) -> type:
    """The options of a command with those that every command with a run's folder has."""
    from agents.runs import Limits

    resume = Annotated[str | None, tyro.conf.arg(help=_RESUME)]
    limits = Annotated[Limits, tyro.conf.arg(name="")]
    parts = [("resume", resume, field(default=None)), ("limits", limits, field(default_factory=Limits))]
    made = make_dataclass(kind.__name__, parts, bases=(kind,), frozen=True)
    made.__doc__ = kind.__doc__
    return made


_RESUME = (
    "The folder of an interrupted run to go on with. Its own options hold; others may be added that change no result."
)


def _taken_up(command: str, out: str, argv: Sequence[str]) -> list[str]:
    """The arguments, behind those of the interrupted run that they name, which also decides how many threads there are.

    Raises:
        ValueError: the folder to resume is no run, or another command's.
    """
    from pathlib import Path

    from agents.runs import read_config

    resume = _option(argv, "--resume")
    folder = resume or _option(argv, "--out") or out
    if resume is None and not (Path(folder) / "config.json").is_file():
        return list(argv)
    config = read_config(Path(folder))
    threads = [] if _option(argv, "--threads") else [f"--threads={_threads_of(config)}"]
    if resume is None:
        return [*argv, *threads]
    made_by, *arguments = _arguments_of(folder, config)
    if made_by != command:
        raise ValueError(f"{folder!r} is a run of `lmgym {made_by}`: go on with `lmgym {made_by} --resume {folder}`")
    return [*arguments, *argv, f"--out={folder}", *threads]


def _threads_of(config: dict[str, Any]) -> int:
    threads = config.get("threads")
    return threads if isinstance(threads, int) and 0 <= threads <= MOST_THREADS else 0


def _arguments_of(folder: str, config: dict[str, Any]) -> list[str]:
    arguments = config.get("arguments")
    texts = isinstance(arguments, list) and all(isinstance(argument, str) for argument in arguments)
    if not texts or not arguments or arguments[0] not in _COMMANDS:
        raise ValueError(f"{folder!r} does not say with which command it was made, and cannot be run again")
    if any(HIDDEN in argument for argument in arguments):
        raise ValueError(f"the command of {folder!r} held a secret, which was not kept: give the whole command again")
    return arguments


def _run(
    command: str, wanted: Any, argv: Sequence[str], about: dict[str, Any] | None = None, track: Sequence[str] = ()
) -> "Run":
    """A command's folder, new or taken up."""
    from agents.runs import Run

    return Run(
        wanted.out,
        _plain(wanted) if about is None else about,
        track=track,
        limits=wanted.limits,
        arguments=[command, *argv],
        inputs=_inputs(wanted),
    )


def _inputs(wanted: Any) -> dict[str, str]:
    """SHA-256 of the files and folders that a command reads, by the names that it was given."""
    from pathlib import Path

    from lmgym import models
    from lmgym.io import atomic
    from lmgym.reward import model

    names = ("prompts", "gold", "preferences", "preferences_file", "test_preferences", "model", "reward", "watch")
    algorithm = getattr(wanted, "algorithm", "")
    given = [getattr(wanted, name, None) for name in names] + [algorithm if algorithm.endswith(".py") else ""]
    # Words that name no file, even where one is called so, such as a folder "tiny".
    words = ("default", "learned", "task", *models.BUILT_IN, *model.BUILT_IN)
    paths = [value for value in given if isinstance(value, str) and value not in words]
    paths = [value.rpartition(":")[0] if ".py:" in value else value for value in paths]
    if getattr(wanted, "teacher", None):
        paths += [f"{wanted.teacher}/policy", f"{wanted.teacher}/sft"]
    return {path: atomic.digest(path) for path in paths if path and Path(path).exists()}


# Names into objects ------------------------------------------------------------------------------------------------


def _setting(wanted: Common, reward: str, preferences: str | None = None, scored: bool = True) -> "Setting":
    """What a command works on.

    Args:
        wanted: the options.
        reward: the value of --reward.
        preferences: a file of comparisons.
        scored: whether the command needs a score at all.
    """
    from agents.pipeline import Setting
    from lmgym.preferences import read_comparisons
    from lmgym.registry import default_arguments, find_spec, make_task
    from lmgym.reward import Score

    _check_numbers(wanted)
    entry = find_spec(wanted.task)
    gold = _function(wanted.gold) if wanted.gold else None
    if wanted.gold and not wanted.prompts:
        raise ValueError("--gold scores prompts of your own: give them with --prompts FILE")
    learned = reward == "learned" or (
        reward == "default" and (wanted.prompts is not None or entry.reward_model is not None)
    )
    score: Score | None = None
    if reward not in ("default", "learned", "task"):
        score = _score(reward)
    if wanted.prompts is not None:
        if scored and gold is None and score is None and not preferences:
            raise ValueError(
                "prompts of your own need a score: --gold module:function, --preferences FILE or --reward MODEL"
            )
        task = _prompt_list(wanted, gold or score)
    else:
        task = make_task(entry)
    if not learned and score is None and entry.reward_model is None:
        score = Score({task.name: task.score})
    comparisons = read_comparisons(preferences) if preferences else None
    budgets: dict[str, Any] = default_arguments(entry, task)
    budgets |= {
        name: value
        for name, value in (
            ("max_prompt_tokens", wanted.max_prompt_tokens),
            ("max_new_tokens", wanted.max_new_tokens),
            ("long_prompts", wanted.long_prompts),
        )
        if value is not None
    }
    budgets["missing_eos_score"] = None if wanted.missing_eos_score == "none" else wanted.missing_eos_score
    lm = _load(wanted.model or entry.model, wanted)
    return Setting(task, lm, budgets, None if learned else score, comparisons, wanted.seed)


def _prompt_list(wanted: Common, score: "ScoreFunction | None") -> "Task":
    from lmgym.tasks import PromptList

    path = wanted.prompts or ""
    if path.endswith(".txt"):
        return PromptList.from_text(path, score)
    whole = wanted.opening_words is not None
    source: Any = PromptList.from_jsonl if path.endswith((".jsonl", ".json")) else PromptList.from_dataset
    return source(path, score, field="text" if whole else "prompt", opening_words=wanted.opening_words)


def _default_score(wanted: Common, setting: "Setting") -> "Score":
    """The score to evaluate with, where none is named: that of the prompts, or the environment's reward model."""
    from lmgym.registry import find_spec
    from lmgym.reward import RewardModel, Score

    name = find_spec(wanted.task).reward_model
    if wanted.prompts is not None or name is None:
        if not setting.task.has_gold:
            raise ValueError("there is no score to evaluate with: give --gold module:function or --reward MODEL")
        return Score({"gold": setting.task.gold})
    return Score({"reward_model": RewardModel.load(name, setting.lm.device)})


def _score(name: str) -> "Score":
    from lmgym.reward import RewardModel, Score

    if ":" in name:
        return Score({name.rpartition(":")[2]: _function(name)})
    return Score({"reward_model": RewardModel.load(name)})


def _function(name: str) -> "ScoreFunction":
    """Loads "package.module:function" or "FILE.py:function".

    Raises:
        ValueError: there is no such module or function.
    """
    import importlib

    from agents.pipeline.catalog import load_file

    source, _, attribute = name.rpartition(":")
    try:
        module = load_file(source) if source.endswith(".py") else importlib.import_module(source)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, FileNotFoundError, ValueError) as error:
        raise ValueError(
            f"no function {name!r} ({error}): write it as package.module:function or path/to/file.py:function; it "
            "takes lists of prompts and completions and returns one number for each"
        ) from error
    if not callable(function):
        raise ValueError(f"{name!r} is not a function")
    return cast("ScoreFunction", function)


def _load(name: str, wanted: Any) -> "LanguageModel":
    import torch

    from lmgym.models import load

    if not 0 <= wanted.threads <= MOST_THREADS:
        raise ValueError(f"--threads {wanted.threads} cannot be: give 0 to {MOST_THREADS}")
    device = wanted.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise ValueError(f"--device {device} cannot be used here: choose 'cpu', 'cuda' where there is one, or 'auto'")
    lm = load(name, device=device, dtype=wanted.dtype, pad_token=wanted.pad_token)
    torch.set_num_threads(wanted.threads or _default_threads(lm.model.num_parameters()))
    return lm


def _default_threads(parameters: int) -> int:
    """One thread for a small model, else one for each core that nobody else uses, as far as torch would use them."""
    import torch

    if parameters < SMALL:
        return 1
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    return max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) - busy))


def _policy(lm: "LanguageModel", folder: str | None, temperature: float) -> "Policy":
    from lmgym.policy import Policy

    return Policy.load(lm, folder, temperature) if folder else Policy(lm, None, temperature, "none")


def _teacher(folder: str, wanted: Any, temperature: float) -> "Policy":
    """The trained policy of a finished run, on that run's fine-tuned model."""
    from pathlib import Path

    from lmgym.policy import Policy

    run = Path(folder)
    if not (run / "policy" / "adapter_config.json").is_file():
        raise ValueError(f"no teacher in {folder!r}: it must be the folder of a finished run, with `sft` and `policy`")
    return Policy.load(_load(str(run / "sft"), wanted), run / "policy", temperature)


def _check_numbers(options: Any) -> None:
    """Refuses negative counts and floats that are no number, but for the settings of an algorithm of somebody's own."""
    import dataclasses
    import math

    for f in dataclasses.fields(options):
        value, option = getattr(options, f.name), f"--{f.name.replace('_', '-')}"
        if dataclasses.is_dataclass(value) and type(value).__module__.startswith(("agents.", "types")):
            _check_numbers(value)
        elif isinstance(value, int) and value < 0:
            raise ValueError(f"{option} {value} is negative: give 0 or more")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{option} {value} is no number: give a finite one")


def _about(setting: "Setting") -> str:
    import torch

    model = setting.lm.model
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    paid = "a reward model that is trained first" if setting.score is None else ", ".join(setting.score.names)
    threads = f", {torch.get_num_threads()} CPU threads" if setting.lm.device.type == "cpu" else ""
    about = f"{millions:.2f} M parameters, {setting.lm.device}{threads}, passes {setting.lm.path()}"
    return f"{setting.task.name}: {setting.lm.name} ({about}); paid by {paid}"


def _plain(value: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(value)


def _plain_text(text: str) -> str:
    from lmgym.io import printable

    return printable(text)


if __name__ == "__main__":
    sys.exit(main())
