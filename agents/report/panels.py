"""Panels: a chart with its title, its legend and its numbers, as HTML."""

from collections.abc import Mapping
from itertools import cycle

import numpy as np

from agents.report.charts import RAMP, SERIES, Curve, line_chart, scatter_charts
from agents.report.formatting import format_number
from agents.report.html import Html, tag
from agents.report.series import metric_table, thin
from agents.report.titles import match_pattern
from agents.report.values import ROUNDING, Row

CSS_BORDERS = {"-": "solid", "--": "dashed", ":": "dotted"}  # CSS's names of matplotlib's styles


def metric_panel(rows: list[Row], key: str, title: str, names: Mapping[str, str | None], best: float | None) -> Html:
    """A panel of the metrics that share a quantity.

    Args:
        rows: of one stage.
        key: the quantity, or the pattern that the metrics' names match.
        title: of the panel.
        names: the metrics, each with its definition.
        best: the best possible value, drawn as a line.
    """
    has_score = any("score/mean" in row for row in rows)
    latest, legend, remarks, spoken, curves = "", [], [], [], []
    for name, colour, dashes in zip(names, cycle(SERIES), cycle(CSS_BORDERS), strict=False):
        curve = Curve(metric_table(rows, name), colour, dashes)
        finite = curve.finite
        if gaps := len(curve.table) - len(finite):
            remarks.append(tag("span", f"{gaps} of {len(curve.table)} values are not finite"))
        if not len(finite):
            continue
        latest = _latest(finite[:, 1], has_score)
        legend.append(_legend_key(f"{_label(key, name)} {latest}", colour, dashes if len(finite) > 1 else None))
        spoken.append(
            f"{name} goes from {format_number(finite[0, 1])} to {format_number(finite[-1, 1])}, "
            f"lowest {format_number(finite[:, 1].min())}, highest {format_number(finite[:, 1].max())}"
        )
        curves.append(curve)
    if len(names) == 1:
        legend = []
    elif key == "score/mean":
        remarks.append(tag("span", "components are shown before their weights"))
    if best is not None:
        legend.append(_legend_key(f"best possible {format_number(best)}", "--muted", "--"))
    chart = line_chart(curves, "update" if has_score else "step", best, f"{title}. {'; '.join(spoken)}")
    caption = tag("figcaption", tag("b", title), " ", tag("span", "" if len(names) > 1 else latest, class_="latest"))
    definitions = "\n".join(f"{name}: {text}" for name, text in names.items() if text) or None
    return tag("figure", caption, chart, tag("small", *legend, *remarks, class_="keys"), title=definitions)


def _latest(values: np.ndarray, has_score: bool) -> str:
    """The last value. Of a metric of minibatches the mean of the last tenth: one minibatch is too noisy."""
    if not has_score and len(values) >= 10:
        return f"{format_number(values[-round(len(values) / 10) :].mean())} (mean of the last 10 %)"
    return format_number(values[-1])


def _label(key: str, name: str) -> str:
    match = match_pattern(key, name) if "{n}" in key else None
    return f"n = {match[1]}:" if match else name.rpartition("/")[2].replace("_", " ")


def _legend_key(text: str, colour: str, dashes: str | None) -> Html:
    """An entry of the legend, below the chart, where it covers no data; `dashes` is None for a single point."""
    variable = f"var({colour})"
    line = f"border-top:2px {CSS_BORDERS[dashes]} {variable}" if dashes else None
    return tag("span", tag("i", style=line) if line else tag("i", "◆", style=f"color:{variable}"), text)


def score_against_kl(rows: list[Row], score_is_gold: bool) -> Html:
    """The score, and the gold score if it differs, against KL: over-optimisation shows as a bend down in the latter.

    Nothing if there are fewer than two updates, or if the policy never left the reference.
    """
    tables = [thin(metric_table(rows, "kl/sequence_nats", name)) for name in ("score/mean", "gold/mean")]
    score, gold = (table[np.isfinite(table).all(axis=1)] for table in tables)
    if len(score) < 2 or np.abs(score[:, 1]).max() < ROUNDING:
        return Html("")
    panels = {"gold score" if score_is_gold else "score": score}
    if len(gold) and not score_is_gold:
        panels["gold score"] = gold
    descriptions = []
    for label, table in panels.items():
        (_, kl, start), (_, end_kl, end) = ([format_number(x) for x in table[at]] for at in (0, -1))
        descriptions.append(f"{label} against KL: from {start} at {kl} to {end} at {end_kl} nats per sequence")
    charts = scatter_charts(list(panels.values()), list(panels), descriptions)
    swatches = [tag("i", style=f"background:var({name})") for name in RAMP]
    last = format_number(max(1.0, score[:, 0].max()))
    legend = tag("span", "○ first, update 0 ", *swatches, f" {last}, last ◇", class_="ramp")
    caption = tag("figcaption", tag("b", "Score against KL"), " ", legend)
    body = tag("div", *charts, class_="panels large")
    if len(panels) == 1:
        return tag("figure", caption, body, class_="wide half")
    aside = tag("small", "Where the score still rises and the gold score turns down, the score is gamed.")
    return tag("figure", caption, body, aside, class_="wide")
