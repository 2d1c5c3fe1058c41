"""`lmgym step RUN`: one update of a run, step by step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from agents.cli import train
from agents.cli.finished import with_paths_from
from agents.cli.folder import arguments_of, threads_of
from agents.cli.options import note, parse
from agents.lessons.walk import WIDE, as_page, print_walk, walk_through
from agents.pipeline import Algorithm, Setting, replay
from agents.runs import StoredRun, read_config, read_rows
from lmgym.io import atomic


@dataclass(frozen=True)
class Step:
    """Make one update of a run again, and walk through it."""

    run: tyro.conf.Positional[str]
    """Folder of a run of `lmgym train`, finished or not. Nothing in it changes."""
    update: int | None = None
    """The update, from 0. By default, the one after the newest checkpoint of an interrupted run, and the first one of a
    finished run. The updates between checkpoint and this one are made again first."""
    rows: tuple[int, ...] = ()
    """Completions to show, by their row. By default, those with the best and with the worst score."""
    html: str | None = None
    """File for the walk as a page, with all passes over the rows."""


def run(argv: Sequence[str]) -> int:
    """Makes the update again, prints it, and writes the page."""
    wanted = parse("step", Step, argv)
    folder = Path(wanted.run)
    options, algorithm, setting = _of_run(folder)
    update = replay(setting, options.options, algorithm, StoredRun(folder, note), wanted.update)
    rows = read_rows(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    logged = [row for row in rows if row.get("stage") == algorithm.name and row.get("step") == update.number]
    about = (update, algorithm.name, wanted.rows, logged[0] if logged else None)
    print_walk(walk_through(*about, most_passes=WIDE), Console())
    if wanted.html:
        atomic.write(Path(wanted.html), as_page(walk_through(*about), wanted.run))
        print(f"page: {wanted.html}")
    return 0


def _of_run(folder: Path) -> tuple[Any, Algorithm, Setting]:
    """The options of a training run, its algorithm and its setting, as `lmgym train` made them.

    Raises:
        ValueError: the folder holds no run, or one of another command.
    """
    config = read_config(folder)
    command, *arguments = arguments_of(str(folder), config)
    if command != "train":
        raise ValueError(f"{str(folder)!r} is a run of `lmgym {command}`, which has no RL: give a run of train")
    options, algorithm = train.parse_options(arguments)
    options = with_paths_from(folder, options, config)
    options, setting = train.setting_for(replace(options, threads=threads_of(config)), arguments, algorithm)
    return options, algorithm, setting
