"""What the run reached: the sentence and the tiles at the top, and the table of metrics before and after training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from agents.report.formatting import format_duration, format_estimate, format_number, with_minus_sign
from agents.report.html import Html, join, small_print, tag, tile
from agents.report.read import RunData
from agents.report.titles import METRIC_TITLES, definition_of, stage_title
from agents.report.values import ROUNDING, Row, as_float, nearly_equal

Part = tuple[list[object], list[Html]]
"""Pieces of the sentence, and tiles."""


def summary(run: RunData) -> Html:
    """The sentence that says what the run reached, and its figures as tiles."""
    words, tiles = _score_change(run)
    kl_words, kl_tiles = _final_kl(run, is_first=not words)
    words += kl_words
    if words:
        words.append(". ")
    seconds = format_duration(total_seconds(run.metrics))
    words += ["Training took ", tag("b", seconds), ", from the start of the run to its last step."]
    stages = " → ".join(stage_title(stage) for stage in run.stages if run.is_training(stage))
    time = tile("Time to the last step", seconds, f"{stages}; what followed is not counted")
    return join(tag("p", *words, class_="lead"), tag("dl", *tiles, *kl_tiles, time, class_="tiles"))


def _score_change(run: RunData) -> Part:
    before, after = _before_and_after(run)
    has_gold = None not in (_estimate(before, "gold")[0], _estimate(after, "gold")[0])
    name = "gold" if has_gold else "score"
    (first, first_error), (last, last_error) = _estimate(before, name), _estimate(after, name)
    if first is None or last is None:
        return [], []
    change, error = last - first, math.hypot(first_error or 0.0, last_error or 0.0)
    old, new = format_estimate(first, first_error), format_estimate(last, last_error)
    title = METRIC_TITLES[name]
    words: list[object] = [f"Training {'raised' if change > 0 else 'lowered'} the {title.lower()} from "]
    if abs(change) <= 2 * error:
        words = [f"Training moved the {title.lower()} by less than two standard errors, from "]
    words += [f"{old} to ", tag("b", new)]
    tiles = [tile(title, new, f"before: {old}")]
    best = as_float(run.evaluation.get("best_gold"))
    if has_gold and best is not None and best > first:
        share = f"{with_minus_sign(f'{100 * change / (best - first):.0f}')} %"
        words += [", ", tag("b", share), f" of the way to the best possible ({format_number(best)})"]
        tiles.append(tile("Of the way to the best", share, f"the best: {format_number(best)}"))
    return words, tiles


def _final_kl(run: RunData, is_first: bool) -> Part:
    """KL after training: exact if the run has it, otherwise k1, the estimate from samples."""
    _, after = _before_and_after(run)
    k1, exact = _estimate(after, "kl_nats_per_sequence"), _estimate(after, "kl_exact_nats_per_sequence")
    (kl, kl_error), kind = (k1, "k1") if exact[0] is None else (exact, "exact")
    if kl is None:
        return [], []
    figure = format_estimate(kl, kl_error)
    opening = "The policy ended " if is_first else ", at "
    also = kind == "exact" and k1[0] is not None
    k1_words = f"; by k1, the estimate from samples: {format_estimate(*k1)}" if also else ""
    words = [opening, tag("b", figure, " nats"), f" of KL per sequence ({kind}{k1_words})"]
    return words, [tile("KL to the reference", figure, f"nats per sequence, {kind}")]


def total_seconds(metrics: Sequence[Row]) -> float:
    """How long the run took. Where `seconds` decreases, a resumed run or a stage run on its own started a new clock."""
    total = last = 0.0
    for row in metrics:
        seconds = as_float(row.get("seconds"))
        if seconds is not None:
            total += seconds - last if seconds >= last else seconds
            last = seconds
    return total


def evaluation_table(run: RunData) -> Html:
    """Every metric of the evaluation before and after training; nothing if the run was not evaluated."""
    before, after = _before_and_after(run)
    definitions = run.definitions_of("evaluation")
    names = sorted(before | after, key=list(METRIC_TITLES | before | after).index)
    score_is_gold = nearly_equal((_estimate(side, "gold")[0], _estimate(side, "score")[0]) for side in (before, after))
    if score_is_gold:
        names.remove("score")
    if not names:
        return Html("")
    rows = [
        tag(
            "tr",
            tag("th", METRIC_TITLES.get(name, name), scope="row", title=definition_of(name, definitions)),
            *_cells(name, _estimate(before, name), _estimate(after, name)),
        )
        for name in names
    ]
    columns = tag("tr", *(tag("th", title, scope="col") for title in ("", "Before", "After", "Change")))
    return join(
        tag("table", tag("thead", columns), tag("tbody", *rows), class_="numbers"),
        small_print(
            "The score is the gold score itself. " if score_is_gold else "",
            "Mean ± standard error over held-out prompts. The error of a change takes both samples as independent; "
            "bold is more than two of its errors from 0.",
        ),
    )


Estimate = tuple[float | None, float | None]
"""A mean and its standard error."""


def _cells(name: str, before: Estimate, after: Estimate) -> list[Html]:
    percent = name.endswith("_share")
    (old, old_error), (new, new_error) = before, after
    change = None if old is None or new is None else new - old
    error = math.hypot(old_error or 0.0, new_error or 0.0)
    is_clear = change is not None and error > 0 and abs(change) > 2 * error
    changed = format_estimate(change, error, percent, "+")
    return [
        tag("td", format_estimate(old, old_error, percent)),
        tag("td", format_estimate(new, new_error, percent)),
        tag("td", tag("b", changed) if is_clear else changed),
    ]


def _before_and_after(run: RunData) -> tuple[Row, Row]:
    return run.evaluation.get("before") or {}, run.evaluation.get("after") or {}


def _estimate(metrics: Mapping[str, Any], name: str) -> Estimate:
    value = metrics.get(name) or {}
    mean, stderr = as_float(value.get("mean")), as_float(value.get("stderr"))
    is_rounding = name.startswith("kl_") and mean is not None and abs(mean) < ROUNDING
    return (0.0, 0.0) if is_rounding else (mean, stderr)
