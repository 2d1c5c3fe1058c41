"""The folder of a run: commands that write one, record their command line there, and resume from it."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from agents.cli.commands import RECORDED
from agents.cli.options import option_value
from agents.runs import FollowingRun, Limits, Run, read_config
from agents.training import require
from lmgym.io import atomic, local_path
from lmgym.io.redact import HIDDEN
from lmgym.models import BUILT_IN as BUILT_IN_MODELS
from lmgym.ranks import current
from lmgym.reward import BUILT_IN as BUILT_IN_REWARD_MODELS

TRL = "trl:"
"""What a reward function in TRL's form has before its name."""
MOST_THREADS = 1024
"""More threads than any machine can use; torch crashes with very many."""
INPUTS = (
    "prompts", "test_prompts_file", "gold", "preferences", "preferences_file", "test_preferences", "model", "reward",
    "watch", "labels", "chat_template",
)  # fmt: skip
"""Options whose value can be the path of a file or folder that the run reads."""
_RESUME = (
    "Folder of an interrupted run to continue. The options of that run apply; you can add options that change no "
    "result."
)


@dataclass(frozen=True)
class Processes:
    """The processes that work on a run together (docs/scaling.md)."""

    procs: int = 1
    """Processes on this machine that work on the run: each decodes its share of the completions, and takes its share
    of every step. The results are the same up to rounding. Leave it out under torchrun, `accelerate launch` or srun."""
    rank_timeout: float = 60.0
    """Seconds after which a process that waits for another one ends the run with an error."""

    def __post_init__(self) -> None:
        require.in_range(self, "procs", least=1)
        require.in_range(self, "rank_timeout", above=0.0)


def recorded(kind: type) -> type:
    """Adds to a command's options those that every command with the folder of a run has."""
    resume = Annotated[str | None, tyro.conf.arg(help=_RESUME)]
    limits = Annotated[Limits, tyro.conf.arg(name="")]
    processes = Annotated[Processes, tyro.conf.arg(name="")]
    parts = [
        ("resume", resume, field(default=None)),
        ("limits", limits, field(default_factory=Limits)),
        ("processes", processes, field(default_factory=Processes)),
    ]
    made = make_dataclass(kind.__name__, parts, bases=(kind,), frozen=True)
    made.__doc__ = kind.__doc__
    return made


def with_recorded_options(command: str, out: str, argv: Sequence[str]) -> list[str]:
    """The whole command line of a run that is new or continues.

    With --resume, the options that the run recorded come before those of `argv`. A run that continues keeps its number
    of threads, on which its results depend.

    Args:
        command: the command that the user gave.
        out: the default of --out.
        argv: the command line after the name of the command.

    Raises:
        ValueError: the folder to resume is not a run, or is a run of another command.
    """
    resume = option_value(argv, "--resume")
    folder = resume or option_value(argv, "--out") or out
    if resume is None and not (Path(folder) / "config.json").is_file():
        return list(argv)
    config = read_config(Path(folder))
    threads = [] if option_value(argv, "--threads") else [f"--threads={threads_of(config)}"]
    if resume is None:
        return [*argv, *threads]
    made_by, *arguments = arguments_of(folder, config)
    if made_by != command:
        raise ValueError(
            f"{folder!r} is a run of `lmgym {made_by}`: continue it with `lmgym {made_by} --resume {folder}`"
        )
    return [*arguments, *argv, f"--out={folder}", *threads]


def threads_of(config: dict[str, Any]) -> int:
    """The number of CPU threads of a run; 0, the default, if its config.json gives none."""
    threads = config.get("threads")
    return threads if isinstance(threads, int) and 0 <= threads <= MOST_THREADS else 0


def arguments_of(folder: str, config: dict[str, Any]) -> list[str]:
    """The command line of a run, which begins with the name of the command.

    Raises:
        ValueError: it was not recorded, or held a secret.
    """
    arguments = config.get("arguments")
    texts = isinstance(arguments, list) and all(isinstance(argument, str) for argument in arguments)
    if not texts or not arguments or arguments[0] not in RECORDED:
        raise ValueError(f"{folder!r} does not record the command that made it, so the command cannot be run again")
    if any(HIDDEN in argument for argument in arguments):
        raise ValueError(
            f"the command of {folder!r} held a secret, which was not recorded: give the whole command again"
        )
    return arguments


def open_run(
    command: str,
    wanted: Any,
    argv: Sequence[str],
    about: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    track: Sequence[str] = (),
) -> Run:
    """The folder of a command, new or continued.

    Args:
        command: its name.
        wanted: its options, with `out` and `limits`.
        argv: its command line, to be recorded.
        about: makes what is recorded out of all options; by default, they are recorded as they are.
        track: services that receive the metrics.
    """
    kind = Run if current().rank == 0 else FollowingRun
    return kind(
        wanted.out,
        about(dataclasses.asdict(wanted)),
        track=track,
        limits=wanted.limits,
        arguments=[command, *argv],
        inputs=input_digests(wanted),
        defaults=about(_defaults(wanted)),
    )


def _defaults(wanted: Any) -> dict[str, Any]:
    """What the options of a command are if nothing is given, as plain data; without those that must be given."""
    found = {}
    for f in dataclasses.fields(wanted):
        if f.default is not dataclasses.MISSING:
            found[f.name] = f.default
        elif f.default_factory is not dataclasses.MISSING:
            default: Any = f.default_factory()
            if dataclasses.is_dataclass(default) and not isinstance(default, type):
                default = dataclasses.asdict(default)
            found[f.name] = default
    return found


def path_of(value: str) -> str:
    """The file of "FILE.py:function" and of "trl:FILE.py:function"; any other value as it is."""
    return value.removeprefix(TRL).rpartition(":")[0] if ".py:" in value else value


def input_digests(wanted: Any) -> dict[str, str]:
    """SHA-256 of the files and folders that a command reads, by the names that the user gave."""
    algorithm = getattr(wanted, "algorithm", "")
    given = [getattr(wanted, name, None) for name in INPUTS] + [algorithm if algorithm.endswith(".py") else ""]
    # These words never mean a file, even if there is one of that name, such as a folder "tiny".
    words = ("default", "learned", "task", *BUILT_IN_MODELS, *BUILT_IN_REWARD_MODELS)
    paths = [value for value in given if isinstance(value, str) and value not in words]
    paths = list(map(path_of, paths))
    if getattr(wanted, "from_adapter", None):
        policy = Path(wanted.from_adapter) / "policy"
        paths.append(str(policy) if policy.is_dir() else wanted.from_adapter)
    if getattr(wanted, "teacher", None):
        paths += [f"{wanted.teacher}/policy", f"{wanted.teacher}/sft"]
    return {name: atomic.digest(path) for name in paths if name and (path := local_path(name)) is not None}
