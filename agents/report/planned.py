"""What the run was planned to cost beside what it cost, from plan.json of the run's folder."""

from agents.report.formatting import MISSING, format_duration, format_number, with_minus_sign
from agents.report.html import Html, join, small_print, tag
from agents.report.read import RunData
from agents.report.titles import stage_title
from agents.report.values import Row, as_float


def planned(run: RunData) -> Html:
    """A table of stages; nothing if the run had no plan."""
    stages, actual = _rows(run.plan.get("stages")), _rows(run.plan.get("actual"))
    if not stages:
        return Html("")
    rows = [_row(stage_title(name), stage, actual.get(name, {})) for name, stage in stages.items()]
    if actual.keys() >= stages.keys():
        rows.append(_row("In all", run.plan["total"], _sum([actual[name] for name in stages])))
    heads = (
        "",
        "Time, planned",
        "90 % band",
        "Time",
        "",
        "Processor, planned",
        "Processor",
        "",
        "Memory, planned",
        "Memory",
        "",
    )
    head = tag("thead", tag("tr", *(tag("th", title, scope="col") for title in heads)))
    return join(
        tag("table", head, tag("tbody", *rows), class_="numbers"),
        small_print(
            "Time by the clock, time of the processor, and peak memory above that of Python with its libraries, in MB. "
            "The plan's times do not count Python's start and this page. Bold: outside of the plan's band."
        ),
    )


def _rows(found: object) -> dict[str, Row]:
    return {name: row for name, row in found.items() if isinstance(row, dict)} if isinstance(found, dict) else {}


def _sum(stages: list[Row]) -> Row:
    """The costs of all stages together."""
    total: Row = {}
    for name in ("seconds", "processor_seconds"):
        values = [as_float(stage.get(name)) for stage in stages]
        total[name] = None if None in values else sum(value for value in values if value is not None)
    peaks = [peak for stage in stages if (peak := as_float(stage.get("peak_mb"))) is not None]
    total["peak_mb"] = max(peaks, default=None)
    return total


def _row(title: str, plan: Row, actual: Row) -> Html:
    cells = []
    for name in ("seconds", "processor_seconds", "peak_mb"):
        band = plan.get(name)
        band = band if isinstance(band, dict) else {}
        value, low, high = (as_float(band.get(key)) for key in ("value", "low", "high"))
        found = as_float(actual.get(name))
        cells.append(tag("td", _shown(name, value)))
        if name == "seconds":
            between = MISSING if low is None or high is None else f"{_shown(name, low)} to {_shown(name, high)}"
            cells.append(tag("td", between))
        cells.append(tag("td", _shown(name, found)))
        change = ""
        if value and found is not None and low is not None and high is not None:
            text = with_minus_sign(f"{round(100 * (found / value - 1)) or 0:+d} %")
            change = text if low <= found <= high else tag("b", text)
        cells.append(tag("td", change))
    return tag("tr", tag("th", title, scope="row"), *cells)


def _shown(name: str, value: float | None) -> str:
    if value is None:
        return MISSING
    if name == "peak_mb":
        return f"{value:,.0f}"
    return format_duration(value) if value >= 10 else f"{format_number(value, 2)} s"
