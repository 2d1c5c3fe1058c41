"""The options and models of a finished run, for `lmgym evaluate RUN` and `lmgym sample RUN`."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from agents.cli import sft, train
from agents.cli.folder import INPUTS, TRL, arguments_of, path_of, threads_of
from agents.cli.names import is_environment
from agents.cli.options import Common, option_value, parse
from agents.pipeline import Algorithm
from agents.runs import read_config

LAST_PRODUCT = {"train": "policy", "sft": "sft"}
"""Commands whose runs can be measured and sampled from, and the folder that each writes last."""


@dataclass(frozen=True)
class FinishedRun:
    """A run whose model can be used.

    Attributes:
        folder: of the run.
        wanted: the options that it was made with.
        threads: of the CPU, when it was made.
        algorithm: that trained its policy; None for a run of `lmgym sft`.
    """

    folder: Path
    wanted: Any
    threads: int
    algorithm: Algorithm | None

    @classmethod
    def read(cls, folder: Path) -> "FinishedRun":
        """Reads a run's config.json.

        Raises:
            ValueError: the folder holds no run, no model, or not yet; it says what to do.
        """
        config = read_config(folder)
        command, *arguments = arguments_of(str(folder), config)
        if command not in LAST_PRODUCT:
            raise ValueError(
                f"{str(folder)!r} is a run of `lmgym {command}`, which trains no policy: give a run of train"
            )
        if not (folder / LAST_PRODUCT[command]).is_dir():
            raise ValueError(
                f"the run in {str(folder)!r} is not finished: it has no folder {LAST_PRODUCT[command]!r}. Continue it "
                f"with `lmgym {command} --resume {folder}`"
            )
        wanted, algorithm = (
            train.parse_options(arguments) if command == "train" else (sft.parse_options(arguments), None)
        )
        return cls(folder, with_paths_from(folder, wanted, config), threads_of(config), algorithm)

    def defaults(self) -> dict[str, Any]:
        """The options of `evaluate` and `sample` with which the run's own policy is used as the run itself used it."""
        common = {f.name: getattr(self.wanted, f.name) for f in fields(Common)}
        found = {**common, "model": str(self.folder / "sft"), "threads": self.threads, "policy": None}
        found |= {"chat_template": None, "template_options": ""}  # they are part of the saved tokenizer
        if self.algorithm is not None:
            found |= {
                "policy": str(self.folder / "policy"),
                "temperature": self.algorithm.rl.temperature,
                "count": self.wanted.options.test_prompts,
                "reward": self.wanted.reward,
            }
            if (self.folder / "reward_model").is_dir():
                found["reward"] = str(self.folder / "reward_model")
        return found

    def figures(self) -> dict[str, float]:
        """What the run itself measured after training, by name; empty if it did not."""
        path = self.folder / "evaluation.json"
        try:
            after = json.loads(path.read_bytes())["after"]
            means = {name: figure["mean"] for name, figure in after.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {name: float(mean) for name, mean in means.items() if isinstance(mean, int | float)}


def with_paths_from(folder: Path, wanted: Any, config: dict[str, Any]) -> Any:
    """The options with those files that are not in the working folder found from where the run was started."""
    start = config.get("working_folder")
    if not isinstance(start, str):
        return wanted
    changed = {}
    for name in INPUTS:
        value = getattr(wanted, name, None)
        if value and isinstance(value, str) and not os.path.exists(path_of(value)):
            prefix = TRL if value.startswith(TRL) else ""
            there = prefix + os.path.normpath(folder / start / value.removeprefix(prefix))
            if os.path.exists(path_of(there)):
                changed[name] = there
    return replace(wanted, **changed)


def parse_with_run(command: str, kind: Any, argv: Sequence[str], own: Sequence[str]) -> tuple[Any, FinishedRun | None]:
    """Options of a command that takes a run in place of an environment, or as --policy.

    Args:
        command: its name.
        kind: its dataclass, with `task` and `policy`.
        argv: its command line; what it gives explicitly overrides the run's options.
        own: fields of `kind`, besides those of `Common`, that the run decides.

    Returns:
        The options, and the run if one was named.

    Raises:
        ValueError: a folder is given that holds no finished run.
    """
    wanted = parse(command, kind, argv)
    named = not is_environment(wanted.task) and Path(wanted.task).is_dir()
    folder = Path(wanted.task) if named else _run_folder(wanted.policy)
    if folder is None:
        return wanted, None
    run = FinishedRun.read(folder)
    known = {f.name for f in fields(Common)} | set(own)
    defaults = {name: value for name, value in run.defaults().items() if name in known}
    if option_value(argv, "--field"):
        defaults["fields"] = ()  # an option that may be repeated would be added to the run's
    found = parse(command, kind, argv, kind(**defaults))
    if named:
        found = replace(found, task=defaults["task"])
    if _run_folder(found.policy):
        found = replace(found, policy=defaults["policy"])
    return found, run


def _run_folder(policy: str | None) -> Path | None:
    """The path of a run that is given as --policy; None for an adapter, which has no config.json."""
    return Path(policy) if policy and (Path(policy) / "config.json").is_file() else None
