"""`lmgym compare`: a page that compares runs."""

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agents.cli.options import parse
from agents.experiments.comparison import Group, compared_figures, difference, read_groups
from agents.experiments.comparison_page import write_comparison
from lmgym.io import printable


@dataclass(frozen=True)
class Compare:
    """Compare runs on one page: curves, differences with intervals, texts side by side."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Folders of finished runs, or folders that hold such folders, as --seeds and `lmgym sweep` make. Runs that differ
    in their seed alone are a group; the differences are to the first group."""
    out: str = "compare.html"
    """The page."""


def run(argv: Sequence[str]) -> int:
    """Prints the figures and the differences, and writes the page."""
    wanted = parse("compare", Compare, argv)
    if not wanted.runs:
        raise ValueError("no runs to compare: give folders of finished runs, such as runs/a runs/b")
    for task, groups in read_groups(wanted.runs).items():
        Console().print(figures_table(task, groups))
    print(printable(f"comparison: {write_comparison(wanted.runs, wanted.out)}"))
    return 0


def figures_table(title: str, groups: Sequence[Group]) -> Table:
    """The figures of each group, means over its runs, and the difference of the first figure to the first group."""
    names = compared_figures(groups)
    shown = ["KL, nats" if name == "kl_nats_per_sequence" else name for name in names]
    table = Table("", "runs", *shown, *([f"{names[0]}: difference", "95 % over prompts"] if names else []), title=title)
    for group in groups:
        figures = [list(group.figure(name).values()) for name in names]
        cells = [f"{sum(values) / len(values):.3f}" for values in figures]
        if names and group is not groups[0]:
            found = difference(group, groups[0], names[0]).over_prompts
            known = found is not None and found.low is not None and found.high is not None
            cells += ["–" if found is None else f"{found.value:+.3f}"]
            cells += [f"{found.low:+.3f} to {found.high:+.3f}" if found is not None and known else "–"]
        table.add_row(Text(printable(group.label)), str(len(group.runs)), *cells)
    return table
