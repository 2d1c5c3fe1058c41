"""Charts and tables of the leaderboard, as markup: inline SVG that needs no script, in the page's colours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from agents.benchmark.table import short
from agents.experiments.statistics import Estimate
from agents.report.html import Html, tag

WIDTH, ROW, LABEL, RIGHT = 760, 26, 170, 150
"""Of a dot plot, in its own units: width, height of a row, room for names and for numbers."""
CHART, LEFT, BOTTOM = (560, 240), 52, 36
"""Size of a line chart, and the room for its axes."""
COLOURS = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--muted")
DASHES = (None, "6 3", "2 3")
"""Lines beyond the sixth have the same colours and another dash."""


@dataclass(frozen=True)
class Curve:
    """A line.

    Attributes:
        name: in the legend.
        points: x and y.
    """

    name: str
    points: Sequence[tuple[float, float]]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], names: int = 1) -> Html:
    """A table of numbers, whose first columns are names."""
    cells = [
        tag("tr", *(tag("th", cell, scope="row") if i < names else tag("td", cell) for i, cell in enumerate(row)))
        for row in rows
    ]
    top = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    return tag("div", tag("table", top, tag("tbody", *cells), class_="numbers"), class_="wide")


def dot_plot(rows: Sequence[tuple[str, Sequence[float], Estimate]], description: str) -> Html:
    """For each agent a dot for every seed, a mark at the mean, and its interval if it has one."""
    values = [v for _, dots, e in rows for v in (*dots, e.low if e.low is not None else e.value, e.value)]
    low, high = min([0.0, *values]), max([1.0, *values])
    low, high = max(low, -1.0), min(high, 1.5)
    height = ROW * len(rows) + 24

    def at(value: float) -> float:
        share = (min(max(value, low), high) - low) / (high - low)
        return round(LABEL + share * (WIDTH - LABEL - RIGHT), 1)

    marks: list[Html] = []
    for tick in _ticks(low, high):
        marks.append(_line(at(tick), 0, at(tick), height - 20))
        marks.append(tag("text", f"{tick:g}", x=at(tick), y=height - 6, text_anchor="middle", class_="muted"))
    for i, (name, dots, estimate) in enumerate(rows):
        y = ROW * i + ROW // 2
        marks.append(tag("text", name[:26], x=LABEL - 10, y=y + 4, text_anchor="end"))
        if estimate.low is not None and estimate.high is not None:
            marks.append(_line(at(estimate.low), y, at(estimate.high), y, "interval"))
        marks += [tag("circle", cx=at(v), cy=y, r=4, class_="dot") for v in dots]
        marks.append(_line(at(estimate.value), y - 8, at(estimate.value), y + 8, "mean"))
        marks.append(tag("text", short(estimate), x=WIDTH - RIGHT + 12, y=y + 4, class_="muted"))
    return tag("svg", *marks, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=description, class_="dots")


def _line(x1: int | float, y1: int | float, x2: int | float, y2: int | float, kind: str | None = None) -> Html:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def line_plot(curves: Sequence[Curve], xlabel: str, description: str, best: float | None = None) -> Html:
    """Lines over one axis, with a legend below."""
    points = [point for curve in curves for point in curve.points]
    if not points:
        return Html("")
    width, height = CHART
    xs, ys = [x for x, _ in points], [y for _, y in points] + ([best] if best is not None else [])
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    right, high = max(right, left + 1e-9), max(high, low + 1e-9)

    def at_x(x: float) -> float:
        return round(LEFT + (x - left) / (right - left) * (width - LEFT - 12), 1)

    def at_y(y: float) -> float:
        return round(8 + (high - y) / (high - low) * (height - BOTTOM - 8), 1)

    marks: list[Html] = []
    for tick in _ticks(low, high):
        marks.append(_line(LEFT, at_y(tick), width - 12, at_y(tick)))
        marks.append(tag("text", f"{tick:g}", x=LEFT - 6, y=at_y(tick) + 4, text_anchor="end", class_="muted"))
    for tick in _ticks(left, right):
        marks.append(tag("text", f"{tick:g}", x=at_x(tick), y=height - 20, text_anchor="middle", class_="muted"))
    marks.append(tag("text", xlabel, x=width - 12, y=height - 4, text_anchor="end", class_="muted"))
    keys = []
    for i, curve in enumerate(curves):
        style = f"stroke: var({COLOURS[i % len(COLOURS)]})"
        dash = DASHES[i // len(COLOURS) % len(DASHES)]
        line = " ".join(f"{at_x(x)},{at_y(y)}" for x, y in curve.points)
        marks.append(tag("polyline", tag("title", curve.name), points=line, style=style, stroke_dasharray=dash))
        key = tag("polyline", points="0,5 26,5", style=style, stroke_dasharray=dash)
        keys.append(tag("span", tag("svg", key, viewBox="0 0 26 10"), curve.name))
    chart = tag("svg", *marks, viewBox=f"0 0 {width} {height}", role="img", aria_label=description, class_="dots")
    return tag("figure", chart, tag("p", *keys, class_="keys note"), class_="half")


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers between two others."""
    power = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if (high - low) / (power * factor) <= 5)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
