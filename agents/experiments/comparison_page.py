"""The page of `lmgym compare`: curves, a dot for each run, differences with paired intervals, and texts side by side.

A single file in the style of a run's report; it loads nothing and runs no script.
"""

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

import numpy as np

from agents.experiments.comparison import Difference, Group, compared_figures, difference, options_of, read_groups
from agents.report.charts import SERIES, chart_style, dots_chart, seeds_chart
from agents.report.document import document
from agents.report.formatting import format_number, with_minus_sign
from agents.report.html import Html, join, small_print, tag
from agents.report.read import RunData
from agents.report.series import metric_table
from agents.report.titles import METRIC_TITLES
from agents.report.tokens import colour_scales, selector_css, side_by_side
from agents.report.values import Row, nearly_equal
from lmgym.io import atomic

CURVES = ("gold/mean", "score/mean", "kl/sequence_nats", "policy/entropy_nats", "tokens/mean")
"""Metrics of the training that are drawn, where all groups log them."""
MAX_GROUPS = 6
"""Maximum number of groups whose curves and texts are shown: there are so many colours."""
SAME = (("gold/mean", "score/mean"), ("gold", "score"))
"""Names of the gold score and the score, of an update and of a sample."""
PROMPTS = 8
"""Maximum number of prompts whose texts are shown."""
Colours = dict[str, str]
"""The colour of each group, by its label."""


def write_comparison(runs: Sequence[str | Path], page: str | Path) -> Path:
    """Writes a page that compares runs.

    Args:
        runs: folders of runs, or folders that hold such folders; see `read_groups`.
        page: the file.

    Returns:
        The path of the page.

    Raises:
        ValueError: a folder holds no finished run, or a run is given twice.
        lmgym.io.atomic.WriteError: the page cannot be written.
    """
    tasks = read_groups(runs)
    sections, samples = [], []
    for number, (task, groups) in enumerate(tasks.items(), start=1):
        part, rows = _task_sections(groups, f"{task}: " if len(tasks) > 1 else "", f"-{number}" if number > 1 else "")
        sections += part
        samples += rows
    count = sum(len(group.runs) for groups in tasks.values() for group in groups)
    facts = [tag("span", tag("b", name), " ", value) for name, value in (("runs", count), ("task", ", ".join(tasks)))]
    title = " · ".join([", ".join(tasks), *_few([group.label for groups in tasks.values() for group in groups])])
    css = selector_css(colour_scales(samples))
    atomic.write(page, document("lmgym comparison", title, facts, sections, "Comparison", css))
    return Path(page)


def _few(labels: Sequence[str]) -> list[str]:
    """At most three labels for the title."""
    known = list(dict.fromkeys(labels))
    return known if len(known) <= 3 else [f"{len(known)} groups"]


def _task_sections(groups: Sequence[Group], prefix: str, suffix: str) -> tuple[list[tuple[str, str, Html]], list[Row]]:
    """The sections of one task, and the samples that they show."""
    figures = compared_figures(groups)
    colours = dict(zip((group.label for group in groups), cycle(SERIES), strict=False))
    drawn = [groups[0], *sorted(groups[1:], key=lambda g: -_mean(g, figures[0]))[: MAX_GROUPS - 1]] if figures else []
    colours |= dict(zip((group.label for group in drawn), SERIES, strict=False))
    texts, samples = _texts(drawn)
    with chart_style():
        sections = [
            ("reached", "After training", _reached(groups, figures, colours)),
            ("differences", "Differences", _differences(groups, figures)),
            ("curves", "Curves", _curves(drawn, len(groups), colours)),
            ("generations", "Texts", texts),
            ("settings", "What differs", _settings(groups)),
        ]
    return [
        (f"{key}{suffix}" if key != "generations" else key, prefix + name, body) for key, name, body in sections
    ], samples


def _mean(group: Group, name: str) -> float:
    return float(np.mean(list(group.figure(name).values())))


# What the runs reached ------------------------------------------------------------------------------------------------


def _reached(groups: Sequence[Group], figures: Sequence[str], colours: Colours) -> Html:
    if not figures:
        return small_print("The runs measured no figure that all of them have.")
    titles = [METRIC_TITLES.get(name, name) for name in figures]
    head = tag("tr", *(tag("th", name, scope="col") for name in ("", "Runs", *titles, f"{titles[0]} before")))
    rows = [
        tag(
            "tr",
            tag("th", f"{number}. ", _key(group.label, colours), scope="row"),
            tag("td", len(group.runs)),
            *(tag("td", format_number(_mean(group, name)), title=_each(group, name)) for name in figures),
            tag("td", format_number(before) if (before := _before(group, figures[0])) is not None else "–"),
        )
        for number, group in enumerate(groups, start=1)
    ]
    best = groups[0].best if figures[0] == "gold" else None
    charts = []
    for name, title in list(zip(figures, titles, strict=True))[:2]:
        dots = [(colours[group.label], list(group.figure(name).values())) for group in groups]
        spoken = "; ".join(f"{group.label}: {_each(group, name)}" for group in groups)
        chart = dots_chart(dots, best if name == "gold" else None, title, f"{title}. {spoken}")
        charts.append(tag("figure", tag("figcaption", tag("b", title)), chart))
    return join(
        tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers"),
        small_print("Means over the runs of a group, on held-out prompts. A dot is a run, a bar the mean of a group."),
        tag("div", *charts, class_="panels large"),
    )


def _key(label: str, colours: Colours) -> Html:
    return join(tag("span", "● ", style=f"color:var({colours[label]})"), label)


def _each(group: Group, name: str) -> str:
    return ", ".join(f"seed {seed} {format_number(value)}" for seed, value in group.figure(name).items())


def _before(group: Group, name: str) -> float | None:
    values = list(group.figure(name, "before").values())
    return float(np.mean(values)) if values else None


# Differences ----------------------------------------------------------------------------------------------------------


def _differences(groups: Sequence[Group], figures: Sequence[str]) -> Html:
    if len(groups) < 2 or not figures:
        return Html("")
    first, notes = groups[0], dict[str, list[str]]()
    head = tag(
        "tr",
        *(
            tag("th", n, scope="col")
            for n in ("", "Figure", "Difference", "95 % over prompts", "By seed", "p over seeds")
        ),
    )
    rows = []
    for group in groups[1:]:
        for name in figures:
            found = difference(group, first, name)
            if found.over_prompts is not None and found.over_prompts.note:
                notes.setdefault(f"{METRIC_TITLES.get(name, name)}: {found.over_prompts.note}", []).append(group.label)
            label = tag("th", group.label if name == figures[0] else "", scope="row")
            rows.append(tag("tr", label, *(tag("td", cell) for cell in _cells(found, METRIC_TITLES.get(name, name)))))
    return join(
        tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers"),
        small_print(
            f"Each group less the first, {first.label}. The interval is of the paired t test, prompt by prompt, of "
            "runs with the same seed: it says how far the difference would move on other held-out prompts, for these "
            "trained policies, and nothing about other seeds. Bold: the interval is without 0. The last column is the "
            "permutation test over seeds, with 3 or more on each side: in what share of all ways to divide the runs "
            "between the two groups do the means differ at least as much? It is not corrected for the number of rows. "
            "No interval over seeds is shown, because on a single task none covers what it claims: look at the dots.",
        ),
        *(small_print(f"No interval for {note} ({'; '.join(labels)}).") for note, labels in notes.items()),
    )


def _cells(found: Difference, title: str) -> list[object]:
    estimate = found.over_prompts
    if estimate is None:
        return [title, "–", "no seed in common", "", _p(found.p_value)]
    value: object = _signed(estimate.value)
    interval = "–"
    if estimate.low is not None and estimate.high is not None:
        value = tag("b", value) if estimate.low > 0 or estimate.high < 0 else value
        interval = f"{_signed(estimate.low)} to {_signed(estimate.high)}"
    return [title, value, interval, "  ".join(map(_signed, found.by_seed.values())), _p(found.p_value)]


def _signed(value: float) -> str:
    return with_minus_sign(f"{value:+.3f}")


def _p(p_value: float | None) -> str:
    return "–" if p_value is None else f"{p_value:.2g}"


# Curves ---------------------------------------------------------------------------------------------------------------


def _curves(groups: Sequence[Group], total: int, colours: Colours) -> Html:
    panels = []
    for name in CURVES:
        tables = [[_table(run, name) for run in group.runs.values()] for group in groups]
        if name == "score/mean" and all(map(score_is_gold, (run for group in groups for run in group.runs.values()))):
            continue
        if not tables or not all(len(table) > 1 for runs in tables for table in runs):
            continue
        title, best = METRIC_TITLES.get(name, name), groups[0].best if name == "gold/mean" else None
        spoken = "; ".join(
            f"{group.label} ends at {', '.join(format_number(table[-1, 1]) for table in runs)}"
            for group, runs in zip(groups, tables, strict=True)
        )
        chart = seeds_chart(
            [(colours[group.label], runs) for group, runs in zip(groups, tables, strict=True)],
            best,
            f"{title}. {spoken}",
        )
        panels.append(tag("figure", tag("figcaption", tag("b", title)), chart))
    if not panels:
        return Html("")
    left_out = f" Drawn are the first group and the best {MAX_GROUPS - 1} of the others." if total > len(groups) else ""
    return join(
        tag("p", *(tag("span", _key(group.label, colours)) for group in groups), class_="facts"),
        tag("div", *panels, class_="panels large"),
        small_print(
            "Thin: each run. Thick: the mean of a group, as far as all its runs go. A curve has no interval, because "
            "on a single task none over seeds covers what it claims.",
            left_out,
        ),
    )


def score_is_gold(run: RunData) -> bool:
    """Whether a run was paid the gold score itself."""
    rows = [*run.stages.get(run.algorithm or "", []), *run.samples]
    return nearly_equal((row.get(gold), row.get(score)) for row in rows for gold, score in SAME if gold in row)


def _table(run: RunData, name: str) -> np.ndarray:
    """[n, 2], update and metric, of the algorithm's stage."""
    table = metric_table(run.stages.get(run.algorithm or "", []), name)
    return table if np.isfinite(table).any() else table[:0]


# Texts ----------------------------------------------------------------------------------------------------------------


def _texts(groups: Sequence[Group]) -> tuple[Html, list[Row]]:
    """Completions of the same prompts, before training and by each group; and the rows that are shown."""
    shared = sorted(set.intersection(*(set(group.runs) for group in groups))) if groups else []
    if not shared:
        return Html(""), []
    seed = shared[0]
    by_prompt = [{(row["when"], row["prompt"]): row for row in reversed(group.runs[seed].samples)} for group in groups]
    prompts = [prompt for when, prompt in reversed(by_prompt[0]) if when == "after"]
    prompts = [prompt for prompt in prompts if all(("after", prompt) in rows for rows in by_prompt)][:PROMPTS]
    entries = []
    for prompt in prompts:
        before = {}
        for group, rows in zip(groups, by_prompt, strict=True):
            row = rows.get(("before", prompt))
            before.setdefault(row["completion"] if row else None, (f"Before ({group.label})", row))
        first = [("Before", next(iter(before.values()))[1])] if len(before) == 1 else list(before.values())
        after = [(group.label, rows["after", prompt]) for group, rows in zip(groups, by_prompt, strict=True)]
        entries.append((prompt, [*first, *after]))
    if all(score_is_gold(group.runs[seed]) for group in groups):
        entries = [(p, [(t, row and row | {"score": None}) for t, row in completions]) for p, completions in entries]
    shown = [row for _, completions in entries for _, row in completions if row is not None]
    if not entries:
        return Html(""), []
    scales = colour_scales(shown)
    return join(small_print(f"The runs with seed {seed}."), side_by_side(entries, scales)), shown


# Settings -------------------------------------------------------------------------------------------------------------


def _settings(groups: Sequence[Group]) -> Html:
    options = [options_of(next(iter(group.runs.values()))) for group in groups]
    names = [name for name in dict.fromkeys(n for o in options for n in o) if len({o.get(name) for o in options}) > 1]
    head = tag("tr", *(tag("th", name, scope="col") for name in ("", *(group.label for group in groups))))
    rows = [
        tag(
            "tr",
            tag("th", name, scope="row"),
            *(tag("td", tag("code", o[name]) if name in o else "–") for o in options),
        )
        for name in names
    ]
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="settings") if rows else ""
    commands = [tag("pre", str(run.config.get("command"))) for group in groups for run in group.runs.values()]
    return join(table, tag("details", tag("summary", "The command of each run"), *commands))
