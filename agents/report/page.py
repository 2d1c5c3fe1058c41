"""One HTML page about one run: what it reached, how it got there, and what the model says before and after.

The page is a single file that loads nothing and runs no script: its charts are inline SVG, its selector is CSS, and its
Content-Security-Policy forbids everything else. Model output may be hostile, so only `tag` makes markup, and it escapes
every string that is not markup itself. The same run folder always gives the same bytes.
"""

import re
from pathlib import Path

from agents.report.document import document
from agents.report.html import Html, tag
from agents.report.planned import planned
from agents.report.preferences import preferences
from agents.report.read import RunData, read_run
from agents.report.settings import settings
from agents.report.stages import stage_sections
from agents.report.summary import evaluation_table, summary
from agents.report.titles import stage_title
from agents.report.tokens import colour_scales, generations, selector_css
from lmgym.io import atomic


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run folder.

    The folder must hold `config.json` and `metrics.jsonl` (rows of stage, step, seconds and metrics; `seconds` counts
    from the start of the run). It may hold `evaluation.json`, `samples.jsonl`, `preferences.jsonl`,
    `preferences_test.jsonl`, `preferences_noise_free.jsonl`, `plan.json`, `warnings.json` and `metrics.json`
    (definitions of metrics by stage and name, where {n} in a name matches digits). A section whose file is missing is
    left out. A value that is null or not finite is drawn as a gap: a run that diverged is the one that needs a report.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folder or a required file is missing, a file is malformed, or an older version wrote the run;
            the message names the file, and the line if there is one.
    """
    folder = Path(folder)
    run = read_run(folder)
    page = folder / "report.html"
    atomic.write(page, _page(run))
    return page


def _page(run: RunData) -> str:
    warnings = tag("ul", *(tag("li", text) for text in run.warnings)) if run.warnings else ""
    sections = [
        ("summary", "Summary", summary(run)),
        ("warnings", "Warnings", warnings),
        ("evaluation", "Before and after", evaluation_table(run)),
        *((f"stage-{i}", name, body) for i, (name, body) in enumerate(stage_sections(run), start=1)),
        ("planned", "Planned and actual cost", planned(run)),
        ("generations", "Generations", generations(run.samples)),
        ("preferences", "Preferences", preferences(run)),
        ("settings", "Settings and definitions", settings(run)),
    ]
    title = _title(run)
    tab = f"{title} · seed {run.config.get('seed', '–')}"
    return document("lmgym run report", title, _facts(run), sections, tab, selector_css(colour_scales(run.samples)))


def _title(run: RunData) -> str:
    """Task, model and algorithm; of paths the last part."""
    paths = [str(run.config[name]).rstrip("/\\") for name in ("task", "model") if run.config.get(name)]
    parts = [re.split(r"[/\\]", path)[-1] for path in paths] or ["unknown task"]
    if run.algorithm:
        parts.append(stage_title(run.algorithm))
    return " · ".join(parts)


def _facts(run: RunData) -> list[Html]:
    facts = {name: run.config.get(name) for name in ("seed", "hardware", "started", "revision")}
    if run.algorithm:
        facts = {"algorithm": stage_title(run.algorithm), **facts}
    return [tag("span", tag("b", name), " ", value) for name, value in facts.items() if value not in (None, "")]
