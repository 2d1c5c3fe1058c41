"""What a study leaves behind: its page, its figure and its verdicts, all written from the results."""

import inspect
import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

from agents.experiments.results import Row
from agents.experiments.statistics import detectable_effect
from agents.report import charts
from agents.studies.form import OUTCOMES, Verdict, mean_curves, measured
from lmgym.io import atomic


def command_of(study: ModuleType, rows: Sequence[Row]) -> str:
    """The command that gave these rows."""
    name, config = study.__name__.rpartition(".")[2], rows[0]["config"]
    for option, settings in (("", study.Config()), (" --quick", study.QUICK)):
        if config == json.loads(json.dumps(asdict(settings))):
            return f"lmgym study {name}{option}"
    return f"lmgym study {name} (with other settings)"


def page_text(study: ModuleType, rows: Sequence[Row], figure: str) -> str:
    """The page of a study, in Markdown: every figure in it is computed from the rows.

    Args:
        study: its module.
        rows: one for each seed.
        figure: path of the picture, as the page links to it.
    """
    verdicts = measured(study, rows)
    quick = " --quick" in command_of(study, rows)
    lines = [f"# {study.TITLE}", "", f"Paper: {study.PAPER}", ""]
    lines += [textwrap.fill(" ".join(part.split()), 120) for part in _paragraphs(study)]
    lines += ["## Verdicts", "", _tally(verdicts), ""]
    lines += ["| claim | wanted | measured: mean and 95 % interval | detectable | verdict |", "|---|---|---|---|---|"]
    lines += [_table_row(verdict) for verdict in verdicts]
    lines += [
        "",
        textwrap.fill(
            f"Known before the run: {len(rows)} seeds find a distance from a bound of "
            f"{detectable_effect(len(rows)):.2f} standard deviations of the seeds with 80 % power. “Detectable” is "
            "that distance in the unit of the measure. A claim “cannot be told” if its interval crosses a bound."
            + (" These are the results of `--quick`: its intervals are wide." if quick else ""),
            120,
        ),
        "",
        f"![{_caption(study)}]({figure})",
        "",
        "Curves are means over seeds.",
        "",
        "## How it was run",
        "",
        "```sh",
        command_of(study, rows),
        "```",
        "",
        *_facts(rows),
        "",
        "The value of each seed:",
        "",
        "```text",
        *(f"{v.claim.name}: {', '.join(f'{value:.3g}' for value in v.values)}" for v in verdicts),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _paragraphs(study: ModuleType) -> list[str]:
    """The docstring after its first line; each paragraph with an empty line behind it."""
    paragraphs = inspect.cleandoc(study.__doc__ or "").split("\n\n")[1:]
    return [part for paragraph in paragraphs for part in (paragraph, "")]


def _tally(verdicts: Sequence[Verdict]) -> str:
    counts = Counter(verdict.outcome for verdict in verdicts)
    parts = [f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]]
    return f"Of {len(verdicts)} claims: {', '.join(parts)}."


def _table_row(verdict: Verdict) -> str:
    estimate, claim = verdict.estimate, verdict.claim
    shown = f"{estimate.value:.3g}"
    if estimate.low is not None and estimate.high is not None:
        shown += f" [{estimate.low:.3g}, {estimate.high:.3g}]"
    # A claim about the mean alone has a power.
    power = "" if verdict.detectable is None or claim.kind in ("identity", "count") else f"{verdict.detectable:.2g}"
    return f"| {claim.text} | {claim.wanted} | {shown} | {power} | **{verdict.outcome}** |"


def _caption(study: ModuleType) -> str:
    return "; ".join(panel.title for panel in study.PANELS)


def _facts(rows: Sequence[Row]) -> list[str]:
    """Seeds, time, hardware, versions and revision, as the rows have them."""
    seconds = sorted(row["seconds"] for row in rows)
    seeds = ", ".join(str(row["seed"]) for row in rows)
    one = rows[0]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(one["versions"].items()))
    hardware = one["hardware"]
    shown = hardware if isinstance(hardware, str) else ", ".join(f"{k}: {v}" for k, v in sorted(hardware.items()))
    revisions = ", ".join(sorted({str(row["revision"]) for row in rows}))
    settings = ", ".join(f"{key}={value}" for key, value in one["config"].items())
    facts = {
        "Seeds": f"{len(rows)} ({seeds})",
        "Time": f"{sum(seconds):.0f} s in all; a seed took {seconds[0]:.0f} to {seconds[-1]:.0f} s",
        "Hardware": shown,
        "Versions": versions,
        "Revision": revisions,
        "Settings": settings,
    }
    return [textwrap.fill(f"- {name}: {text}", 120, subsequent_indent="  ") for name, text in facts.items()]


def figure_text(study: ModuleType, rows: Sequence[Row]) -> str:
    """The figure of a study, as SVG: one chart for each panel."""
    panels = [(p.title, p.xlabel, p.ylabel, mean_curves(rows, p.name)) for p in study.PANELS]
    return charts.panels_as_svg(panels)


def write_page(study: ModuleType, rows: Sequence[Row], folder: Path) -> Path:
    """Writes NAME.md, NAME.svg and NAME.json, the verdicts, into a folder; returns the path of the page."""
    name = study.__name__.rpartition(".")[2]
    page = page_text(study, rows, f"{name}.svg")
    atomic.write(folder / f"{name}.svg", figure_text(study, rows))
    verdicts = [verdict.as_data() for verdict in measured(study, rows)]
    atomic.write(folder / f"{name}.json", json.dumps(verdicts, indent=1, ensure_ascii=False) + "\n")
    atomic.write(folder / f"{name}.md", page)
    return folder / f"{name}.md"
