"""One HTML page about one run: what it reached, how it got there, and what the model says before and after.

The page is a single file that loads nothing and runs no script: its charts are inline SVG, its selector is CSS, and its
Content-Security-Policy forbids everything else. Model output may be hostile, so only `tag` makes markup, and it escapes
every string that is not markup itself. The same run folder always gives the same bytes.
"""

import re
from functools import cache
from importlib import resources
from pathlib import Path

from agents.report.html import Html, tag
from agents.report.preferences import preferences
from agents.report.read import RunData, read_run
from agents.report.settings import settings
from agents.report.stages import stage_sections
from agents.report.summary import evaluation_table, summary
from agents.report.titles import stage_title
from agents.report.tokens import colour_scales, generations, selector_css
from lmgym.io import atomic

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run folder.

    The folder must hold `config.json` and `metrics.jsonl` (rows of stage, step, seconds and metrics; `seconds` counts
    from the start of the run). It may hold `evaluation.json`, `samples.jsonl`, `preferences.jsonl`,
    `preferences_test.jsonl`, `preferences_noise_free.jsonl`, `warnings.json` and `metrics.json` (definitions of metrics
    by stage and name, where {n} in a name matches digits). A section whose file is missing is left out. A value that is
    null or not finite is drawn as a gap: a run that diverged is the one that needs a report.

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
        ("generations", "Generations", generations(run.samples)),
        ("preferences", "Preferences", preferences(run)),
        ("settings", "Settings and definitions", settings(run)),
    ]
    sections = [section for section in sections if section[2]]
    title = _title(run)
    header = tag(
        "header",
        tag("p", "lmgym run report", class_="kicker"),
        tag("h1", title),
        tag("p", *_facts(run), class_="facts"),
        tag("nav", *(tag("a", name, href=f"#{key}") for key, name, _ in sections), aria_label="Sections"),
    )
    main = tag("main", *(tag("section", tag("h2", name), body, id=key) for key, name, body in sections))
    return f"<!DOCTYPE html>\n{tag('html', _head(run, title), tag('body', header, main), lang='en')}\n"


def _head(run: RunData, title: str) -> Html:
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{title} · seed {run.config.get('seed', '–')}"),
        tag("style", Html(style_sheet() + selector_css(colour_scales(run.samples)))),
    )


@cache
def style_sheet() -> str:
    """The page's style sheet, style.css."""
    return resources.files("agents.report").joinpath("style.css").read_text(encoding="utf-8")


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
