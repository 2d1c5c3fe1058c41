"""One HTML page about one run: what it reached, how it got there, and what the model says before and after.

The page is a single file that loads nothing and runs no script: its charts are inlined SVG, its selector is CSS, and
its Content-Security-Policy forbids the rest. Model output is hostile until escaped, so markup is only ever made by
`tag`, which escapes every string that is not markup itself. The same run folder always gives the same bytes.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from agents.report.charts import MATPLOTLIB, ROUNDING, SMOOTH_FROM, draw_panel, finite_values, fits, score_against_kl
from agents.report.html import Html, duration, join, minus, note, number, same, tag, with_error
from agents.report.read import Row, RunData, as_float, read_run
from agents.report.style import CSS
from agents.report.tokens import generations, quantities, selector_css
from lmgym.io import atomic

# What a reader looks at first, in this order; every other metric is drawn below, folded away.
_TITLES = {
    "score/mean": "Score",
    "gold/mean": "Gold score",
    "kl/sequence_nats": "KL (k1), nats per sequence",
    "kl/beta": "β, score per nat",
    "policy/entropy_nats": "Entropy, nats per token",
    "tokens/mean": "Tokens per completion",
    "value/explained_variance": "Explained variance of the value",
    "loss": "Loss, nats",
    "accuracy": "Accuracy",
    "margin": "Margin, score",
    "calibration/ece": "Calibration error (ECE)",
    "gold": "Gold score",
    "score": "Score",
    "kl_exact_nats_per_sequence": "KL (exact), nats per sequence",
    "kl_nats_per_sequence": "KL (k1), nats per sequence",
    "entropy_nats_per_token": "Entropy, nats per token",
    "tokens": "Tokens",
    "finished_share": "Finished",
    "distinct_2": "Distinct pairs",
}


_STAGES = {"sft": "Supervised fine-tuning", "reinforce": "REINFORCE", "online_dpo": "Online DPO"}


# Metrics that differ only in one of these endings are the same quantity and share a panel.
_SPLITS = ("train", "test", "noise_free")


def write_report(folder: str | Path) -> Path:
    """Writes `report.html` into a run folder.

    The folder holds `config.json` and `metrics.jsonl` (rows of stage, step, seconds and metrics; `seconds` counts from
    the start of the run), and may hold `evaluation.json` and `samples.jsonl`: a section without its file is left out;
    and `metrics.json`, definitions of metrics by stage and name, where {n} in a name stands for any digits.
    A metric that is null or not finite is drawn as a gap, for the run that diverged is the one to look at.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folder or a required file is missing, or a file is malformed; names the file and the line.
    """
    folder = Path(folder)
    run = read_run(folder)
    page = folder / "report.html"
    atomic.write(page, _page(run))
    return page


def _total_seconds(metrics: Sequence[Row]) -> float:
    """How long the run took. A clock that goes back was started anew: by a resumed run, or by a stage run alone."""
    total = last = 0.0
    for row in metrics:
        seconds = as_float(row.get("seconds"))
        if seconds is not None:
            total += seconds - last if seconds >= last else seconds
            last = seconds
    return total


def _page(run: RunData) -> str:
    config = run.config
    paths = [str(config[name]).rstrip("/\\") for name in ("task", "model") if config.get(name)]
    title = " · ".join(re.split(r"[/\\]", path)[-1] for path in paths) or "unknown task"
    sections = [
        ("summary", "Summary", _summary(run)),
        ("warnings", "Warnings", tag("ul", *(tag("li", text) for text in run.warnings)) if run.warnings else ""),
        ("evaluation", "Before and after", _evaluation_table(run)),
        *((f"stage-{i}", name, body) for i, (name, body) in enumerate(_stages(run), start=1)),
        ("generations", "Generations", generations(run.samples)),
        ("settings", "Settings and definitions", _settings(run)),
    ]
    sections = [section for section in sections if section[2]]
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", f"{title} · seed {config.get('seed', '–')}"),
        tag("style", Html(CSS + selector_css(quantities(run.samples)))),
    )
    header = tag(
        "header",
        tag("p", "lmgym run report", class_="kicker"),
        tag("h1", title),
        tag("p", *_facts_of_run(config), class_="facts"),
        tag("nav", *(tag("a", name, href=f"#{key}") for key, name, _ in sections), aria_label="Sections"),
    )
    main = tag("main", *(tag("section", tag("h2", name), body, id=key) for key, name, body in sections))
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', header, main), lang='en')}\n"


def _facts_of_run(config: Row) -> list[Html]:
    names = ("seed", "hardware", "started", "revision")
    facts = [(name, str(config[name])) for name in names if config.get(name) not in (None, "")]
    return [tag("span", tag("b", name), " ", value) for name, value in facts]


def _summary(run: RunData) -> Html:
    before, after = (run.evaluation.get(when) or {} for when in ("before", "after"))
    has_gold = None not in (_estimate(before, "gold")[0], _estimate(after, "gold")[0])
    name = "gold" if has_gold else "score"
    (first, first_error), (last, last_error) = _estimate(before, name), _estimate(after, name)
    k1, exact = _estimate(after, "kl_nats_per_sequence"), _estimate(after, "kl_exact_nats_per_sequence")
    best = as_float(run.evaluation.get("best_gold"))
    words, tiles = [], []
    if first is not None and last is not None:
        change, error = last - first, math.hypot(first_error or 0.0, last_error or 0.0)
        old, new = with_error(first, first_error), with_error(last, last_error)
        if abs(change) <= 2 * error:
            words += [f"Training moved the {_TITLES[name].lower()} by less than two standard errors, from "]
        else:
            words += [f"Training {'raised' if change > 0 else 'lowered'} the {_TITLES[name].lower()} from "]
        words += [f"{old} to ", tag("b", new)]
        tiles.append(_tile(_TITLES[name], new, f"before: {old}"))
        if has_gold and best is not None and best > first:
            share = f"{minus(f'{100 * change / (best - first):.0f}')} %"
            words += [", ", tag("b", share), f" of the way to the best possible ({number(best)})"]
            tiles.append(_tile("Of the way to the best", share, f"the best: {number(best)}"))
    (kl, kl_error), kind = (k1, "k1") if exact[0] is None else (exact, "exact")
    if kl is not None:
        figure = with_error(kl, kl_error)
        words += [", at " if words else "The policy ended ", tag("b", figure, " nats"), f" of KL per sequence ({kind}"]
        words += [
            "" if kind == "k1" or k1[0] is None else f"; by k1, the estimate from samples: {with_error(*k1)}",
            ")",
        ]
        tiles.append(_tile("KL to the reference", figure, f"nats per sequence, {kind}"))
    if words:
        words.append(". ")
    seconds = duration(_total_seconds(run.metrics))
    words += ["Training took ", tag("b", seconds), ", from the start of the run to its last step."]
    stages = [_stage_title(name) for name, rows in _by_stage(run.metrics).items() if _is_training(run, name, rows)]
    tiles.append(_tile("Time to the last step", seconds, f"{' → '.join(stages)}; what followed is not counted"))
    return join(tag("p", *words, class_="lead"), tag("dl", *tiles, class_="tiles"))


def _tile(name: str, figure: str, note: str = "") -> Html:
    return tag("div", tag("dt", name), tag("dd", figure), tag("dd", note, class_="note") if note else "", class_="tile")


def _estimate(metrics: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    value = metrics.get(name) or {}
    mean, stderr = as_float(value.get("mean")), as_float(value.get("stderr"))
    return (0.0, 0.0) if name.startswith("kl_") and mean is not None and abs(mean) < ROUNDING else (mean, stderr)


def _evaluation_table(run: RunData) -> Html:
    before, after = (run.evaluation.get(when) or {} for when in ("before", "after"))
    names, meanings = sorted(before | after, key=list(_TITLES | before | after).index), run.meanings("evaluation")
    is_gold = same((_estimate(side, "gold")[0], _estimate(side, "score")[0]) for side in (before, after))
    if is_gold:
        names.remove("score")
    if not names:
        return Html("")
    rows = []
    for name in names:
        percent = name.endswith("_share")
        (old, old_error), (new, new_error) = _estimate(before, name), _estimate(after, name)
        change = None if old is None or new is None else new - old
        error = math.hypot(old_error or 0.0, new_error or 0.0)
        clear = change is not None and error > 0 and abs(change) > 2 * error
        cells = (
            with_error(old, old_error, percent),
            with_error(new, new_error, percent),
            with_error(change, error, percent, "+"),
        )
        rows.append(
            tag(
                "tr",
                tag("th", _TITLES.get(name, name), scope="row", title=_meaning(meanings, name)),
                *(tag("td", cell) for cell in cells[:2]),
                tag("td", tag("b", cells[2]) if clear else cells[2]),
            )
        )
    columns = tag("tr", *(tag("th", name, scope="col") for name in ("", "Before", "After", "Change")))
    return join(
        tag("table", tag("thead", columns), tag("tbody", *rows), class_="numbers"),
        note(
            "The score is the gold score itself. " if is_gold else "",
            "Mean ± standard error over held-out prompts. The error of a change takes both samples as independent; "
            "bold is more than two of its errors from 0.",
        ),
    )


def _by_stage(metrics: Sequence[Row]) -> dict[str, list[Row]]:
    stages: dict[str, list[Row]] = {}
    for row in metrics:
        stages.setdefault(row["stage"], []).append(row)
    return stages


def _stage_title(stage: str) -> str:
    return _STAGES.get(stage, stage.upper() if len(stage) <= 5 else stage.replace("_", " ").capitalize())


def _is_training(run: RunData, stage: str, rows: Sequence[Row]) -> bool:
    """Whether a stage trains; what only samples or asks is of less interest."""
    return bool(run.meanings(stage)) or any("loss/train" in row for row in rows)


def _meaning(meanings: Mapping[str, str], name: str) -> str | None:
    return meanings.get(name) or next((text for pattern, text in meanings.items() if fits(pattern, name)), None)


def _stages(run: RunData) -> list[tuple[str, Html]]:
    """Title and panels of each stage that trains, and of the rest together."""
    best = as_float(run.evaluation.get("best_gold"))
    sections, others = [], []
    with matplotlib.rc_context():
        # The reader's own matplotlibrc would change the bytes.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(MATPLOTLIB)
        for name, rows in _by_stage(run.metrics).items():
            title, body = _stage_title(name), _stage(rows, best, run.meanings(name))
            if _is_training(run, name, rows):
                sections.append((title, body))
            else:
                others.append(tag("details", tag("summary", title), body))
    return [*sections, ("Other stages", join(*others))]


def _group(name: str, names: Collection[str], meanings: Mapping[str, str]) -> str:
    """The panel that a metric is drawn in: of its quantity, of the score that it is a part of, or of its pattern."""
    quantity, _, split = name.partition("/")
    if split in _SPLITS:
        return quantity
    if quantity == "score" and "score/mean" in names:
        return "score/mean"
    return next((pattern for pattern in meanings if "{n}" in pattern and fits(pattern, name)), name)


def _stage(rows: list[Row], best_gold: float | None, meanings: Mapping[str, str]) -> Html:
    """The panels of one stage; metrics measured once are numbers instead."""
    is_gold = same((row["gold/mean"], row.get("score/mean")) for row in rows if "gold/mean" in row)
    titles = _TITLES | ({"score/mean": "Gold score"} if is_gold else {})
    hidden = ("stage", "step", "seconds", *(("gold/mean",) if is_gold else ()))
    names = dict.fromkeys(name for row in rows for name in row if name not in hidden)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, names, meanings), []).append(name)

    first, more, tiles, smoothed = [], [], [], len(rows) >= SMOOTH_FROM
    for key in sorted(groups, key=list(titles | groups).index):
        names = groups[key]
        if any(len(finite_values(rows, name)) > 1 for name in names):
            best = best_gold if titles.get(key) == "Gold score" else None
            title = titles.get(key, key if len(names) > 1 else names[0])
            panel = draw_panel(rows, key, title, {name: _meaning(meanings, name) for name in names}, best)
            (first if key in titles or "{n}" in key else more).append(panel)
        else:
            tiles += [
                _tile(titles.get(name, name), number(next(iter(finite_values(rows, name)), None))) for name in names
            ]
    parts = [score_against_kl(rows, is_gold)]
    if first:
        parts.append(tag("div", *first, class_="panels"))
    if tiles:
        parts.append(tag("dl", *tiles, class_="tiles"))
    if first + more:
        lines = "Thin lines: the metrics as logged. Thick lines: their running mean. " if smoothed else ""
        parts.append(note(lines, "A number beside a curve is its last value, unless it says otherwise."))
    if more:
        parts.append(tag("details", tag("summary", f"More metrics ({len(more)})"), tag("div", *more, class_="panels")))
    return join(*parts) or note("This stage logged no metrics.")


def _settings(run: RunData) -> Html:
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", tag("code", value))) for name, value in _flatten(run.config)
    ]
    parts = [tag("details", tag("summary", "All settings"), tag("table", tag("tbody", *rows), class_="settings"))]
    if command := run.config.get("command"):
        parts.insert(0, tag("pre", command))
    definitions = []
    logged = _by_stage(run.metrics) | {"evaluation": [run.evaluation.get(when) or {} for when in ("before", "after")]}
    for stage, rows in logged.items():
        names = {name for row in rows for name in row}
        known = [
            join(tag("dt", tag("code", name)), tag("dd", text))
            for name, text in run.meanings(stage).items()
            if any(fits(name, logged_name) for logged_name in names)
        ]
        if known:
            definitions += [tag("h3", _stage_title(stage)), tag("dl", *known, class_="definitions")]
    if definitions:
        parts.append(tag("details", tag("summary", "What each metric means"), *definitions))
    return join(*parts)


def _flatten(value: object, name: str = "") -> list[tuple[str, str]]:
    """Nested objects as dotted names, in their own order."""
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in _flatten(inner, f"{name}.{key}" if name else str(key))]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]
