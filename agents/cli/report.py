"""`lmgym report`: report.html for the folder of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from agents.cli.options import parse
from agents.report import write_report
from lmgym.io import printable


@dataclass(frozen=True)
class Report:
    """Write report.html for the folder of a run."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of runs."""


def run(argv: Sequence[str]) -> int:
    """Writes the report of each run and prints its path."""
    runs = parse("report", Report, argv).runs
    if not runs:
        raise ValueError("no run to report on: give the folder of one, such as runs/latest")
    for folder in runs:
        print(printable(str(write_report(folder))))
    return 0
