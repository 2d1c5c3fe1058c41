"""Charts as inline SVG, drawn by matplotlib. Only this module imports it.

The page colours the charts: `svg` replaces each colour of `COLOURS` by the style sheet's variable of that name, which
has one value for a light page and one for a dark page.
"""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agents.report.html import Html, tag
from agents.report.series import SMOOTH_FROM, mean_of_runs, running_mean, thin

# Names and light values of variables in style.css. Each value occurs once, because `svg` finds the name by the value.
COLOURS = {
    "--ink": "#1f2328",
    "--muted": "#59636e",
    "--rule": "#d8dee4",
    "--series-1": "#1f6feb",
    "--series-2": "#bc4c00",
    "--series-3": "#0f766e",
    "--series-4": "#8250df",
    "--series-5": "#9a6700",
    "--ramp-1": "#a8cdf5",
    "--ramp-2": "#7aadf1",
    "--ramp-3": "#4c8eee",
    "--ramp-4": "#2070ea",
    "--ramp-5": "#185ac0",
    "--ramp-6": "#114596",
    "--ramp-7": "#0a2f6b",
}

SERIES = ("--series-1", "--series-2", "--series-3", "--series-4", "--series-5", "--muted")
RAMP = tuple(name for name in COLOURS if name.startswith("--ramp"))

INK, MUTED, RULE = (COLOURS[name] for name in ("--ink", "--muted", "--rule"))
_NAMES = {value: name for name, value in COLOURS.items()}

_STYLE: dict[Any, object] = {
    "svg.hashsalt": "lmgym",
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-3, 5),
    "axes.xmargin": 0.02,
    "axes.ymargin": 0.08,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        table: [n, 2], x and y; y is NaN at a gap.
        colour: a name of `COLOURS`.
        dashes: matplotlib's line style.
    """

    table: np.ndarray
    colour: str
    dashes: str = "-"

    @property
    def finite(self) -> np.ndarray:
        """The rows whose y is finite."""
        return self.table[np.isfinite(self.table[:, 1])]


@contextmanager
def chart_style() -> Iterator[None]:
    """Draws with this page's style, whatever the reader's own matplotlibrc says: the bytes must not depend on it."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float, ticks: int) -> tuple[Figure, Axes]:
    """A figure in inches, with margins that do not depend on the labels, so that panels in a grid line up."""
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 0.46, 0.08, 0.42, 0.2
    ax = figure.subplots()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    ax.yaxis.set_major_locator(MaxNLocator(ticks))
    return figure, ax


def line_chart(curves: Sequence[Curve], xlabel: str, best: float | None, description: str) -> Html:
    """A small chart of one quantity, with a dashed line at the best possible value."""
    figure, ax = new_figure(3.6, 1.95, 4)
    for curve in curves:
        _draw_curve(ax, curve)
    if best is not None:
        ax.axhline(best, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return svg(figure, description)


def seeds_chart(groups: Sequence[tuple[str, Sequence[np.ndarray]]], best: float | None, description: str) -> Html:
    """A chart with a thin line for each run, and a thick one for the mean of the runs of a group.

    Args:
        groups: a colour, and the runs [n, 2] of each group: update and value.
        best: the best possible value, drawn as a dashed line.
        description: for those who cannot see the chart.
    """
    figure, ax = new_figure(4.4, 2.6, 5)
    for name, runs in groups:
        if len(runs) > 1:
            for run in runs:
                ax.plot(*thin(run).T, color=COLOURS[name], linewidth=0.7, alpha=0.45)
        table = mean_of_runs(runs)
        smooth = running_mean(table) if len(table) >= SMOOTH_FROM else table
        ax.plot(*thin(smooth).T, color=COLOURS[name], linewidth=1.9, marker="o" if len(table) == 1 else None)
    if best is not None:
        ax.axhline(best, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set_xlabel("update")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    return svg(figure, description)


def dots_chart(
    groups: Sequence[tuple[str, Sequence[float]]], best: float | None, xlabel: str, description: str
) -> Html:
    """A row for each group, with a dot for each run and a bar at their mean.

    Args:
        groups: a colour, and the value of each run, from top to bottom.
        best: the best possible value, drawn as a dashed line.
        xlabel: what the values are.
        description: for those who cannot see the chart.
    """
    figure, ax = new_figure(4.4, 0.62 + 0.22 * len(groups), 5)
    for row, (name, values) in enumerate(groups):
        ax.plot(values, [row] * len(values), "o", color=COLOURS[name], markersize=5, alpha=0.6, markeredgewidth=0)
        ax.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color=COLOURS[name], linewidth=1.9)
    if best is not None:
        ax.axvline(best, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
    ax.set_ylim(len(groups) - 0.4, -0.6)
    ax.set_yticks(range(len(groups)), [str(row) for row in range(1, len(groups) + 1)])
    ax.grid(True, axis="x")
    ax.grid(False, axis="y")
    ax.set_xlabel(xlabel)
    return svg(figure, description)


def _draw_curve(ax: Axes, curve: Curve) -> None:
    finite, colour = curve.finite, COLOURS[curve.colour]
    style: dict[str, Any] = {"color": colour, "linestyle": curve.dashes if len(finite) > 1 else "none"}
    style["linewidth"] = 1.7
    if len(curve.table) >= SMOOTH_FROM:
        ax.plot(*thin(curve.table).T, color=colour, linewidth=0.7, alpha=0.4)
        ax.plot(*thin(running_mean(curve.table)).T, **style)
    elif len(finite) == 1:
        ax.plot(*finite.T, **style, marker="D", markersize=5)
    else:
        # A line alone would hide how few values there are.
        ax.plot(*finite.T, **style, marker="o" if len(finite) <= 25 else None, markersize=3)


def panels_as_svg(panels: Sequence[tuple[str, str, str, Mapping[str, Sequence[tuple[float, float]]]]]) -> str:
    """A picture of its own, with one chart beside another: for pages in Markdown.

    Args:
        panels: for each chart its title, the labels of both axes, and the curves by their label, as points.
    """
    with chart_style():
        figure = Figure(figsize=(4.4 * len(panels), 3.1), layout="constrained", facecolor="white")
        for ax, (title, xlabel, ylabel, curves) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for index, (label, points) in enumerate(curves.items()):
                x, y = zip(*points, strict=True)
                colour = COLOURS[SERIES[index % len(SERIES)]]
                marker = "o" if len(points) <= 12 else None
                ax.plot(x, y, color=colour, linewidth=1.5, marker=marker, markersize=3, label=label)
            ax.set(xlabel=xlabel, ylabel=ylabel)
            ax.set_title(title, loc="left", fontsize=9)
            if len(curves) > 1:
                ax.legend(frameon=False, fontsize=8)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return file.getvalue()


def scatter_charts(tables: Sequence[np.ndarray], titles: Sequence[str], descriptions: Sequence[str]) -> list[Html]:
    """Charts of scores against KL, with one KL axis for all of them.

    Args:
        tables: for each chart [n, 3]: the update, KL in nats per sequence, the score.
        titles: of the charts.
        descriptions: of the charts, for those who cannot see them.
    """
    last = max(1.0, tables[0][:, 0].max())
    drawn = [new_figure(4.4, 2.9, 6) for _ in tables]
    axes = [ax for _, ax in drawn]
    for ax, table, title in zip(axes, tables, titles, strict=True):
        _draw_scatter(ax, table, last)
        ax.set_title(title, loc="left", fontsize=9, color=MUTED)
    low, high = (min(ax.get_xlim()[0] for ax in axes), max(ax.get_xlim()[1] for ax in axes))
    for ax in axes:
        ax.set_xlim(low, high)
    return [svg(figure, text) for (figure, _), text in zip(drawn, descriptions, strict=True)]


def _draw_scatter(ax: Axes, table: np.ndarray, last: float) -> None:
    kl, values, ramp = table[:, 1], table[:, 2], ListedColormap([COLOURS[name] for name in RAMP])
    ax.plot(kl, values, color=RULE, linewidth=0.8, zorder=1)
    ax.scatter(kl, values, c=table[:, 0], cmap=ramp, vmin=0, vmax=last, s=16, linewidths=0, zorder=2)
    for at, marker in ((0, "o"), (-1, "D")):
        ax.scatter(kl[at], values[at], s=70, marker=marker, facecolors="none", edgecolors=INK, linewidths=1)
    # Gao et al. 2022: the score grows with the root of KL. A root scale also separates the early updates.
    ax.set_xscale("function", functions=(_signed_root, _signed_square))
    ax.xaxis.set_major_locator(MaxNLocator(6))
    ax.margins(x=0.06, y=0.12)
    ax.set_xlabel("KL (k1) to the reference, nats per sequence (root scale)")


def _signed_root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def svg(figure: Figure, description: str) -> Html:
    """The figure as an element of the page: no document header, no global style, colours as variables."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    source = file.getvalue()
    match = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>(.*)</svg>', source, re.DOTALL)
    assert match, "matplotlib wrote no <svg>"
    # matplotlib's style rule would apply to the whole page; the names of its groups repeat from figure to figure.
    body = re.sub(r"<style.*?</style>", "", match[2], flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r' style="[^"]*"', lambda style: re.sub(r"#[0-9a-f]{6}\b", _variable, style[0]), body)
    return tag("svg", Html(body), viewBox=match[1], role="img", aria_label=description)


def _variable(colour: re.Match[str]) -> str:
    name = _NAMES.get(colour[0])
    return f"var({name})" if name else colour[0]
