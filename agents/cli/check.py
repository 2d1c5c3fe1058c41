"""`lmgym check FILE.py`: the contract tests of `lmgym.testing` on what a file holds."""

import dataclasses
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import tyro

from agents.cli.options import importable, parse
from agents.learner import Learner, LearnerConfig
from agents.pipeline import load_algorithm as catalog
from lmgym.env import TokenVectorEnv
from lmgym.io import encodable, printable
from lmgym.tasks import Task
from lmgym.testing import check_algorithm, check_task

TRAINER_ARGUMENTS = {"seed", "lr", "updates"}
"""What a `train` without `Config` takes besides policy and environment: the form of `lmgym.testing.check_algorithm`."""


@dataclass(frozen=True)
class Check:
    """Check an algorithm or a task of your own against its contract. The settings of the algorithm are added under its
    name."""

    file: tyro.conf.Positional[str]
    """FILE.py or package.module with an algorithm (`Config` and `train`) or tasks (subclasses of `lmgym.Task`). Tasks
    are made without arguments."""
    skip: tuple[str, ...] = ()
    """Checks of an algorithm to leave out, by the key that the table shows: for one that breaks a check on purpose."""
    kl: Literal["auto", "sampled", "none", "reference"] = "auto"
    """Form of KL that the environment pays. "auto": what `Config.env_kl` says, otherwise "sampled"; "none" for an
    algorithm with KL in its loss."""
    rows: int = 256
    """Completions per rollout; a multiple of the algorithm's group."""
    lr: float = 0.1
    """Learning rate of the checks in which something is learned."""
    updates: int = 250
    """Rollouts in which the optimum must be reached."""
    draws: int = 50
    """Prompts of each split that are drawn from a task."""
    allow_shared_prompts: bool = False
    """Let a task have the same prompts in both splits, as a probe with few prompts does."""


def run(argv: Sequence[str]) -> int:
    """Prints a line for each check; status 1 if any fails."""
    wanted, module = parse_options(argv)
    failures, found = 0, 0
    for name, task in _tasks(module):
        found += 1
        failures += not _passes(f"task {name}", module, partial(_check_task, task, wanted))
    train = getattr(module, "train", None)
    if callable(train):
        found += 1
        failures += not _passes(f"algorithm {_name(module)}", module, partial(_check_algorithm, module, wanted))
    if not found:
        raise ValueError(
            f"nothing to check in {wanted.file!r}: an algorithm is a dataclass `Config` and a generator "
            "`train(policy, env, learner, config)`, a task is a subclass of `lmgym.Task`"
        )
    return 1 if failures else 0


def parse_options(argv: Sequence[str]) -> tuple[Any, ModuleType]:
    """The options, with those of the algorithm in the file, and the module.

    Raises:
        ValueError: no file is given, the file does not exist, or it raises while it is imported.
    """
    if not argv or argv[0].startswith("-"):
        parse("check", Check, argv)
        raise ValueError("give the file first: lmgym check FILE.py [OPTIONS]")
    load = catalog.load_file if argv[0].endswith(".py") else catalog.load_module
    try:
        module = load(argv[0])
    except (ModuleNotFoundError, FileNotFoundError) as error:
        raise ValueError(f"nothing to check: {error}; give FILE.py or package.module") from error
    config = getattr(module, "Config", None)
    if not (inspect.isclass(config) and dataclasses.is_dataclass(config)):
        return parse("check", Check, argv), module
    own = Annotated[config, tyro.conf.arg(name=_name(module))]
    kind = dataclasses.make_dataclass(
        "Check", [("config", own, field(default_factory=config))], bases=(Check,), frozen=True
    )
    with importable(module):
        return parse("check", kind, argv), module


def _name(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def _tasks(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """The tasks that a module defines: its objects, and its classes without an object."""
    made = {type(value) for value in vars(module).values() if isinstance(value, Task)}
    for name, value in list(vars(module).items()):
        if inspect.isclass(value) and value in made:
            continue
        own = inspect.isclass(value) and issubclass(value, Task) and value.__module__ == module.__name__
        if (own and not inspect.isabstract(value)) or isinstance(value, Task):
            yield name, value


def _check_task(task: Any, wanted: Any) -> None:
    made: Any = task
    if inspect.isclass(task):
        try:
            made = task()
        except TypeError as error:
            raise AssertionError(
                f"{task.__name__} cannot be made without arguments ({error}): give them defaults, or add a line like "
                f"`task = {task.__name__}(…)` to the file"
            ) from error
    check_task(made, wanted.draws, wanted.allow_shared_prompts)
    print(f"ok    prompts and splits, {wanted.draws} of each; scores: finite, one each, in any batch and order")


def _check_algorithm(module: ModuleType, wanted: Any) -> None:
    config = getattr(wanted, "config", None)
    if config is None and set(inspect.signature(module.train).parameters) >= TRAINER_ARGUMENTS:
        trainer, own_kl = module.train, "sampled"
    else:
        catalog.check(module, wanted.file)
        needed = [name for name, optional in catalog.extra_arguments(module).items() if not optional]
        if needed:
            raise ValueError(
                f"`train` needs {', '.join(needed)}: only algorithms that learn from their rollouts alone have this "
                "contract. Test yours as tests/test_algorithms.py tests DPO"
            )
        trainer, own_kl = _trainer(module, config), getattr(config, "env_kl", "sampled")
    kl: Any = own_kl if wanted.kl == "auto" else wanted.kl
    check_algorithm(trainer, kl=kl, rows=wanted.rows, lr=wanted.lr, updates=wanted.updates, skip=wanted.skip)


def _trainer(module: ModuleType, config: Any) -> Any:
    """The module's `train` in the form that `check_algorithm` calls."""

    def train(policy: Any, env: TokenVectorEnv, *, seed: int, lr: float, updates: int) -> Iterator[dict[str, float]]:
        counts = {"updates": updates} if hasattr(config, "updates") else {}
        learner = Learner(policy.parameters(), LearnerConfig(lr=lr, warmup=0.0), seed)
        rows = module.train(policy, env, learner, dataclasses.replace(config, **counts))
        yield from (row for row, _ in zip(rows, range(updates), strict=False))

    return train


def _passes(name: str, module: ModuleType, check: Callable[[], object]) -> bool:
    """Runs a check under its name; prints why it fails. Errors that are not of the module's own code are raised."""
    print(printable(name))
    try:
        check()
    except AssertionError as error:
        lines = str(error).splitlines()
        if len(lines) == 1:  # of a task; the table of an algorithm was already printed
            print(encodable(f"FAIL  {printable(lines[0])}"))
        return False
    except Exception as error:
        mine = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == module.__file__]
        if not mine:
            raise
        at = f"{Path(mine[-1].filename).name}, line {mine[-1].lineno}"
        print(encodable(f"FAIL  it raised {type(error).__name__}: {printable(str(error))} ({at})"))
        return False
    return True
