"""`leaderboard.html`: one file that loads nothing and runs no script, from the rows of results alone."""

import math
from collections.abc import Mapping

from agents.benchmark.drawing import Curve, dot_plot, line_plot, table
from agents.benchmark.league import Results, Standing
from agents.benchmark.table import LEGEND, PART, last_line, provenance, short, two
from agents.experiments import statistics
from agents.report.document import document
from agents.report.html import Html, join, tag

STYLE = """
.numbers tbody th { text-align: left; font-weight: 400; padding-right: 18px }
.numbers td, .numbers thead th { padding-left: 18px }
.dots text { font-size: 12px; fill: var(--ink) } .dots .muted { fill: var(--muted) }
.dots line { stroke: var(--rule) } .dots .dot { fill: var(--series-1); fill-opacity: .45 }
.dots .mean { stroke: var(--ink); stroke-width: 2 } .dots .interval { stroke: var(--series-1); stroke-width: 3 }
.dots .other { fill: var(--muted) } code { font-size: 13px; overflow-wrap: anywhere }
polyline { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke }
.keys svg { display: inline-block; width: 26px; height: 10px; margin-right: 6px; vertical-align: middle }
"""


def page(results: Results) -> str:
    """The whole page."""
    views = [("overall", "All tasks", _overall(results))]
    for row in results.suite.rows:
        views.append((f"task-{row.name}", row.name, _task(results, row.name)))
    sections = [
        *views,
        ("compute", "Equal compute", _compute(results)),
        ("differences", "Differences", _differences(results)),
        ("frontiers", "Gold against KL", _frontiers(results)),
        ("profiles", "Performance profiles", _profiles(results)),
        ("runs", "Every agent", _agents(results)),
    ]
    title = f"{results.suite.name} leaderboard"
    facts = [tag("span", line.removeprefix("- ").replace("`", "")) for line in provenance(results)]
    return document("lmgym benchmark", title, facts, sections, title, STYLE)


def _overall(results: Results) -> Html:
    tasks = results.suite.tasks
    shown = [s for s in results.standings if s.seeds]
    rows = [
        [s.agent, short(results.mean(s)), two(statistics.interquartile_mean(s.scores)), f"{s.seeds}", *_means(s)]
        for s in shown
    ]
    dots = [(s.agent, _per_seed(s), results.mean(s)) for s in shown]
    lacking = [
        f"{s.agent} lacks {len(s.missing)} results, the first is {s.missing[0]}" for s in results.standings if s.missing
    ]
    return join(
        tag("p", LEGEND, class_="note"),
        tag("p", PART) if not results.is_whole else "",
        dot_plot(dots, "Mean over tasks of each seed, with the 95 % interval of the mean"),
        table(["agent", "mean", "IQM", "seeds", *tasks], rows),
        tag("p", "; ".join(lacking), class_="note") if lacking else "",
    )


def _task(results: Results, task: str) -> Html:
    """One task's view: agents by their mean, a dot for each seed, and what the task separates."""
    row, shown = results.suite.row(task), [s for s in results.standings if s.seeds]
    order = sorted(shown, key=lambda s: -_mean(s.scores[task]))
    dots = [(s.agent, list(s.scores[task].values()), statistics.Estimate(_mean(s.scores[task]))) for s in order]
    limits = f"; at most {row.max_kl:g} nats of KL" if row.max_kl is not None else ""
    metric = "gold − β·KL" if row.metric == "objective" else "gold"
    facts = (
        f"{row.id}; {metric}; {row.tokens:,} sampled tokens{limits}; β {row.beta:g}; reference {row.reference:.3g}, "
        f"best {row.best:.3g}"
    )
    pairs = [f"{a} − {b}: {by:.2f} (p {p:.2g})" for a, b, by, p in results.separations[task]]
    return join(
        tag("p", f"{row.capability[0].upper()}{row.capability[1:]}"),
        tag("p", facts, class_="note"),
        dot_plot(dots, f"Scores on {task}, one dot for each seed"),
        _curves(results, task),
        tag("p", "Separates ", "; ".join(pairs), class_="note") if pairs else "",
    )


def _compute(results: Results) -> Html:
    shown = sorted((s for s in results.standings if s.seeds), key=lambda s: -results.mean(s, "passes").value)
    rows = []
    for s in shown:
        curves = [row["result"]["curve"] for row in s.rows if row["status"] == "ok"]
        spent = [{name: c[-1][name] - c[0][name] for name in c[-1]} for c in curves]
        tokens = max(1.0, sum(end["tokens"] for end in spent))
        each = [f"{sum(end[name] for end in spent) / tokens:.1f}" for name in ("forward", "backward")]
        seconds = sum(end["cpu_seconds"] for end in spent) / max(1, len(spent))
        rows.append([s.agent, short(results.mean(s, "passes")), *each, f"{seconds:.1f}"])
    head = ["agent", "mean", "forward passes per sampled token", "backward passes", "CPU s per run"]
    return join(
        tag(
            "p",
            "The same runs, each read at its last evaluation within the task's budget of token passes.",
            class_="note",
        ),
        table(head, rows),
    )


def _differences(results: Results) -> Html:
    rows = [
        [d.one, d.other, short(d.paired), "–" if d.p_value is None else f"{d.p_value:.2g}", short(d.improvement)]
        for d in results.differences
    ]
    notes = dict.fromkeys(d.paired.note for d in results.differences if d.paired.note)
    return join(
        tag("p", "Mean over tasks of the paired difference; p is adjusted for all pairs (Holm).", class_="note"),
        table(["better", "other", "difference", "p", "probability of improvement"], rows, names=2),
        *(tag("p", f"Without interval: {note}.", class_="note") for note in notes),
    )


def _agents(results: Results) -> Html:
    parts = []
    for s in results.standings:
        failed = [f"{r['task']}, seed {r['index']}: {r['status']}, {last_line(r['error'])}" for r in s.failed]
        parts.append(
            tag(
                "details",
                tag("summary", s.agent),
                tag("p", tag("code", s.command)),
                tag("p", tag("code", str(dict(s.config))), class_="note"),
                tag("ul", *(tag("li", text) for text in failed)) if failed else "",
            )
        )
    return join(*parts)


def _means(standing: Standing) -> list[str]:
    return [two(_mean(scores)) for scores in standing.scores.values()]


def _mean(scores: Mapping[int, float]) -> float:
    return math.fsum(scores.values()) / len(scores)


def _per_seed(standing: Standing) -> list[float]:
    return [_mean({t: s[i] for t, s in enumerate(standing.scores.values())}) for i in range(standing.seeds)]


# Curves ---------------------------------------------------------------------------------------------------------------

THRESHOLDS = [t / 40 for t in range(-8, 45)]


def _curves(results: Results, task: str) -> Html:
    """The normalised metric against sampled tokens, mean over seeds, of all agents that were evaluated on the way."""
    row = results.suite.row(task)
    span = row.best - row.reference
    curves = [
        Curve(agent, [(p["tokens"], (row.value(p) - row.reference) / span) for p in points])
        for agent, points in _mean_curves(results, task)
        if len(points) > 2
    ]
    return line_plot(curves, "sampled tokens", f"{task}: score against sampled tokens", best=1.0)


def _frontiers(results: Results) -> Html:
    """Gold against the root of KL, on each task: what a policy gained for how far it moved."""
    charts = []
    for row in results.suite.rows:
        curves = [
            Curve(agent, [(math.sqrt(max(0.0, p["kl"])), p["gold"]) for p in points])
            for agent, points in _mean_curves(results, row.name)
        ]
        chart = line_plot(curves, "√KL to the reference, KL in nats per completion", f"{row.name}: gold against √KL")
        charts.append(tag("figure", tag("figcaption", tag("b", row.name)), chart))
    return tag("div", *charts, class_="panels large")


def _profiles(results: Results) -> Html:
    """The share of runs above each score."""
    curves = [
        Curve(s.agent, list(zip(THRESHOLDS, statistics.performance_profile(s.scores, THRESHOLDS), strict=True)))
        for s in results.standings
        if s.seeds
    ]
    return join(
        tag("p", "The share of runs, over all tasks, whose score is above τ. It has no interval.", class_="note"),
        line_plot(curves, "normalised score τ", "share of runs above a score"),
    )


def _mean_curves(results: Results, task: str) -> list[tuple[str, list[dict[str, float]]]]:
    """For each agent its evaluations on a task, mean over the runs that have that many."""
    found = []
    for s in results.standings:
        curves = [r["result"]["curve"] for r in s.rows if r["task"] == task and r["status"] == "ok"]
        if curves:
            length = min(map(len, curves))
            points = [
                {name: math.fsum(c[i][name] for c in curves) / len(curves) for name in ("tokens", "kl", "gold")}
                for i in range(length)
            ]
            found.append((s.agent, points))
    return found
