"""The run's command, its settings, and the definitions of its metrics."""

import json
from collections.abc import Mapping

from agents.report.html import Html, join, tag
from agents.report.read import RunData
from agents.report.titles import match_pattern, stage_title


def settings(run: RunData) -> Html:
    """The section with the command, all settings and all definitions."""
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", tag("code", value))) for name, value in flatten(run.config)
    ]
    parts = [tag("details", tag("summary", "All settings"), tag("table", tag("tbody", *rows), class_="settings"))]
    if command := run.config.get("command"):
        parts.insert(0, tag("pre", command))
    if definitions := _definitions(run):
        parts.append(tag("details", tag("summary", "What each metric means"), *definitions))
    return join(*parts)


def _definitions(run: RunData) -> list[Html]:
    """Definitions of the metrics that the run logged, by stage."""
    found = []
    evaluated = [run.evaluation.get(when) or {} for when in ("before", "after")]
    for stage, rows in (run.stages | {"evaluation": evaluated}).items():
        logged = {name for row in rows for name in row}
        known = [
            join(tag("dt", tag("code", name)), tag("dd", text))
            for name, text in run.definitions_of(stage).items()
            if any(match_pattern(name, metric) for metric in logged)
        ]
        if known:
            found += [tag("h3", stage_title(stage)), tag("dl", *known, class_="definitions")]
    return found


def flatten(value: object, name: str = "") -> list[tuple[str, str]]:
    """Nested objects as pairs of a dotted name and a value, in their own order."""
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in flatten(inner, f"{name}.{key}" if name else str(key))]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
