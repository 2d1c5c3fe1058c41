"""`lmgym study NAME`: runs a study, and says which of the paper's claims held here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from agents.cli.commands import did_you_mean
from agents.cli.options import note, parse
from agents.experiments.runner import Workers
from agents.experiments.statistics import detectable_effect
from agents.studies import STUDIES, Verdict, measured, run_study, study_named, write_page
from lmgym.io import printable


@dataclass(frozen=True)
class Study:
    """Run a study: what a paper claims, what is measured here, and whether it holds."""

    name: tyro.conf.Positional[str]
    """Name of the study; `lmgym studies` lists them."""
    quick: bool = False
    """A smaller study, of at most ten minutes on two cores. Its intervals are wide."""
    out: str = ""
    """Folder of the results: runs/studies/NAME by default. A study that was interrupted goes on there."""
    jobs: int = 1
    """Number of seeds that run at the same time."""
    retry_failed: bool = False
    """Run seeds again that ended without a result."""


def run(argv: Sequence[str]) -> int:
    """Runs the seeds that are not done, and writes the page."""
    wanted = parse("study", Study, argv)
    if wanted.name not in STUDIES:
        hint = did_you_mean(wanted.name, STUDIES)
        raise ValueError(f"no study {wanted.name!r}.{hint} `lmgym studies` lists them: {', '.join(STUDIES)}")
    study = study_named(wanted.name)
    folder = Path(wanted.out or f"runs/studies/{wanted.name}")
    if wanted.quick:
        note("--quick runs a smaller study: its intervals are wide")
    config = study.QUICK if wanted.quick else study.Config()
    console = Console(soft_wrap=True)
    effect = detectable_effect(config.seeds)
    console.print(
        f"{study.TITLE}: {len(study.CLAIMS)} claims, {config.seeds} seeds, which find a distance from a bound"
    )
    console.print(f"of {effect:.2f} standard deviations of the seeds with 80 % power")
    rows = run_study(
        wanted.name, config, folder, Workers(wanted.jobs),
        wanted.retry_failed, lambda progress: console.print(printable(progress.text), markup=False),
    )  # fmt: skip
    verdicts = measured(study, rows)
    page = write_page(study, rows, folder)
    _show(console, verdicts)
    console.print(printable(f"page: {page}"), markup=False)
    return 0


def _show(console: Console, verdicts: Sequence[Verdict]) -> None:
    table = Table("claim", "wanted", "measured", "verdict")
    for verdict in verdicts:
        table.add_row(verdict.claim.text, verdict.claim.wanted, str(verdict.estimate), verdict.outcome)
    console.print(table)
