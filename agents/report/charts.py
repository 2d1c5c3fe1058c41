"""Charts as inline SVG, drawn by matplotlib."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agents.report.html import Html, number, tag
from agents.report.read import Row, as_float

INK, MUTED, RULE, BLUE, ORANGE, TEAL = "#1f2328", "#59636e", "#d8dee4", "#1f6feb", "#bc4c00", "#0f766e"


CURVES = (BLUE, ORANGE, TEAL, "#8250df", "#9a6700", MUTED)


DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}  # matplotlib's names and CSS's


UPDATES = LinearSegmentedColormap.from_list("updates", ["#a8cdf5", "#1f6feb", "#0a2f6b"])


MATPLOTLIB: dict[Any, object] = {
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


POINTS = 400  # a panel is some 350 pixels wide: more points are only noise and bytes


SMOOTH_FROM = 40  # rows from which a mean line helps more than it hides


REACH = 4  # rows that it takes in on either side; more in long runs


ROUNDING = 1e-5  # KL in nats that is only the rounding of its logarithms


def finite_values(rows: Sequence[Row], name: str) -> list[float]:
    """The finite values of a metric, in the order of the rows."""
    return [value for row in rows if (value := as_float(row.get(name))) is not None]


def series(rows: Sequence[Row], *names: str) -> np.ndarray:
    """The step and the metrics, [n, 1 + names], of the rows that hold them all; NaN where one is not finite."""
    table = [
        [math.nan if (value := as_float(row[name])) is None else value for name in ("step", *names)]
        for row in rows
        if all(name in row for name in names)
    ]
    series = np.array(table, dtype=float).reshape(len(table), 1 + len(names))
    if (np.diff(series[:, 0]) <= 0).any():
        series[:, 0] = np.arange(len(series))  # the stage ran more than once
    return series


def _thin(table: np.ndarray) -> np.ndarray:
    """Means of neighbouring rows, so that a long run still fits its panel."""
    size = math.ceil(len(table) / POINTS)
    if size <= 1:
        return table
    return np.array([table[start : start + size].mean(axis=0) for start in range(0, len(table), size)])


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the finite values within `reach` on either side: a trailing mean would lag behind."""
    finite, window = np.isfinite(values), np.ones(2 * reach + 1)
    sums, counts = (np.convolve(column, window)[reach:-reach] for column in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def draw_panel(rows: list[Row], key: str, title: str, names: Mapping[str, str | None], best: float | None) -> Html:
    """One small chart of the metrics that share a quantity, given with their definitions."""
    figure, ax = new_figure(3.6, 1.95, 4)
    scored = any("score/mean" in row for row in rows)
    latest, keys, notes, spoken = "", [], [], []
    for name, color, dashes in zip(names, cycle(CURVES), cycle(DASHES), strict=False):
        table = series(rows, name)
        finite = table[np.isfinite(table[:, 1])]
        if gaps := len(table) - len(finite):
            notes.append(tag("span", f"{gaps} of {len(table)} values are not finite"))
        if not len(finite):
            continue
        latest = number(finite[-1, 1])
        if not scored and len(finite) >= 10:  # one minibatch says little
            latest = f"{number(finite[-round(len(finite) / 10) :, 1].mean())} (mean of the last 10 %)"
        n = match[1] if "{n}" in key and (match := fits(key, name)) else None
        label = f"n = {n}:" if n else name.rpartition("/")[2].replace("_", " ")
        keys.append(legend_key(f"{label} {latest}", color, DASHES[dashes] if len(finite) > 1 else None))
        spoken.append(
            f"{name} goes from {number(finite[0, 1])} to {number(finite[-1, 1])}, "
            f"lowest {number(finite[:, 1].min())}, highest {number(finite[:, 1].max())}"
        )
        _draw_curve(ax, table, finite, color, dashes)
    if len(names) == 1:
        keys = []
    elif key == "score/mean":
        notes.append(tag("span", "components are shown before their weights"))
    if best is not None:
        ax.axhline(best, color=MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
        keys.append(legend_key(f"best possible {number(best)}", MUTED, "dashed"))
    ax.set_xlabel("update" if scored else "step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    caption = tag("figcaption", tag("b", title), " ", tag("span", "" if len(names) > 1 else latest, class_="latest"))
    description = "\n".join(f"{name}: {text}" for name, text in names.items() if text) or None
    below = tag("small", *keys, *notes, class_="keys")
    return tag("figure", caption, svg(figure, f"{title}. {'; '.join(spoken)}"), below, title=description)


def legend_key(text: str, color: str, line: str | None) -> Html:
    """An entry of a legend, below its chart, where it can cover no data; `line` is None for a lone point."""
    mark = tag("i", style=f"border-top:2px {line} {color}") if line else tag("i", "◆", style=f"color:{color}")
    return tag("span", mark, text)


def _draw_curve(ax: Axes, table: np.ndarray, finite: np.ndarray, color: str, dashes: str) -> None:
    style: dict[str, Any] = {"color": color, "linestyle": dashes if len(finite) > 1 else "none", "linewidth": 1.7}
    if len(table) >= SMOOTH_FROM:
        ax.plot(*_thin(table).T, color=color, linewidth=0.7, alpha=0.4)
        mean = np.column_stack([table[:, 0], _smooth(table[:, 1], max(REACH, len(table) // 40))])
        ax.plot(*_thin(mean).T, **style)
    elif len(finite) == 1:
        ax.plot(*finite.T, **style, marker="D", markersize=5)
    else:
        # A line alone would hide how few values there are.
        ax.plot(*finite.T, **style, marker="o" if len(finite) <= 25 else None, markersize=3)


def score_against_kl(rows: list[Row], is_gold: bool) -> Html:
    """What the score cost, and whether the gold score came along: over-optimisation shows as a bend down."""
    tables = [_thin(series(rows, "kl/sequence_nats", name)) for name in ("score/mean", "gold/mean")]
    score, gold = (table[np.isfinite(table).all(axis=1)] for table in tables)
    if len(score) < 2 or np.abs(score[:, 1]).max() < ROUNDING:
        return Html("")
    panels = {"gold score": score} if is_gold else {"score": score} | ({"gold score": gold} if len(gold) else {})
    last = max(1.0, score[:, 0].max())
    figures, axes = zip(*(new_figure(5.2, 3.3, 6) for _ in panels), strict=True)
    for ax, (label, table) in zip(axes, panels.items(), strict=True):
        kl, values = table[:, 1], table[:, 2]
        ax.plot(kl, values, color=RULE, linewidth=0.8, zorder=1)
        ax.scatter(kl, values, c=table[:, 0], cmap=UPDATES, vmin=0, vmax=last, s=16, linewidths=0, zorder=2)
        for at, marker in ((0, "o"), (-1, "D")):
            ax.scatter(kl[at], values[at], s=70, marker=marker, facecolors="none", edgecolors=INK, linewidths=1)
        # Gao et al. 2022: score grows with the root of KL. The root spreads the early updates out.
        ax.set_xscale("function", functions=(_signed_root, _signed_square))
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.set_title(label, loc="left", fontsize=9, color=MUTED)
        ax.margins(x=0.06, y=0.12)
        ax.set_xlabel("KL (k1) to the reference, nats per sequence (root scale)")
    low, high = (min(ax.get_xlim()[0] for ax in axes), max(ax.get_xlim()[1] for ax in axes))
    for ax in axes:
        ax.set_xlim(low, high)
    ramp = [tag("i", style=f"background:{to_hex(UPDATES(x))}") for x in np.linspace(0, 1, 7)]
    legend = tag("span", "○ first, update 0 ", *ramp, f" {number(last)}, last ◇", class_="ramp")
    charts = []
    for figure, (label, table) in zip(figures, panels.items(), strict=True):
        (_, kl, start), (_, end_kl, end) = ([number(x) for x in table[i]] for i in (0, -1))
        charts.append(svg(figure, f"{label} against KL: from {start} at {kl} to {end} at {end_kl} nats per sequence"))
    caption = tag("figcaption", tag("b", "Score against KL"), " ", legend)
    body = tag("div", *charts, class_="panels large")
    if len(panels) == 1:
        return tag("figure", caption, body, class_="wide half")
    aside = tag("small", "Where the score still rises and the gold score turns down, the score is gamed.")
    return tag("figure", caption, body, aside, class_="wide")


def _signed_root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def new_figure(width: float, height: float, ticks: int) -> tuple[Figure, Axes]:
    """A figure in inches, with margins that don't depend on the labels: panels in a grid line up."""
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 0.46, 0.08, 0.42, 0.2
    ax = figure.subplots()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    ax.yaxis.set_major_locator(MaxNLocator(ticks))
    return figure, ax


def svg(figure: Figure, description: str) -> Html:
    """The figure as an element of the page, without what belongs to a file of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    source = file.getvalue()
    match = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>(.*)</svg>', source, re.DOTALL)
    assert match, "matplotlib wrote no <svg>"
    # Its style rule would apply to the whole page; names of groups would repeat from figure to figure.
    body = re.sub(r"<style.*?</style>", "", match[2], flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    return tag("svg", Html(body), viewBox=match[1], role="img", aria_label=description)


def fits(pattern: str, name: str) -> re.Match[str] | None:
    """Whether a definition's name is a metric's; {n} in it is any digits, which are group 1."""
    # Possessive, so that no pattern of a run takes long.
    return re.fullmatch(re.escape(pattern).replace(r"\{n\}", r"(\d++)"), name)
