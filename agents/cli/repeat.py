"""`lmgym repeat`: the command of a run again, and whether the results are the same."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from agents.cli.commands import run_command
from agents.cli.folder import arguments_of, threads_of
from agents.cli.options import parse, without_options
from agents.cli.ranks import run_on_new_processes
from agents.runs import read_config
from agents.runs.compare import compare
from agents.runs.machine import revision, versions


@dataclass(frozen=True)
class Repeat:
    """Run the command of a run again and compare the results, bit by bit."""

    run: tyro.conf.Positional[str]
    """Folder of a finished run."""
    out: str | None = None
    """Folder of the repetition. By default, the folder of the run with "-repeat" appended."""


def run(argv: Sequence[str]) -> int:
    """Repeats a run and prints which results are the same; status 1 if any differs."""
    wanted = parse("repeat", Repeat, argv)
    config = read_config(Path(wanted.run))
    folder = os.path.normpath(wanted.run)
    if os.path.basename(folder) in (".", ".."):  # nothing can be appended to these
        folder = os.path.abspath(folder)
    out = wanted.out or f"{folder}-repeat"
    _warn_of_differences(config)
    command, *rest = arguments_of(wanted.run, config)
    arguments = [
        *without_options(rest, {"--plan": 1}),
        f"--out={out}",
        f"--threads={threads_of(config)}",
        "--max-time=0",
    ]
    arguments.append(f"--procs={config.get('ranks', 1)}")
    status = run_on_new_processes(command, arguments)
    status = run_command(command, arguments) if status is None else status
    if status:
        return status
    found = compare(Path(wanted.run), Path(out))
    table = Table("what", "the same")
    for name, same in found.items():
        table.add_row(name, "yes" if same else "no")
    Console().print(table)
    return 0 if all(found.values()) else 1


def _warn_of_differences(config: dict[str, Any]) -> None:
    """Names each version that has changed since the run."""
    here = {"revision": revision(), **versions()}
    kept = config.get("versions")
    there = {"revision": config.get("revision"), **(kept if isinstance(kept, dict) else {})}
    for name, value in here.items():
        if there.get(name) != value:
            was = there.get(name)
            print(f"lmgym: {name} was {was} then and is {value} now: the results may differ", file=sys.stderr)
