"""A walk through one update: rollout, reward of each token, advantages, ratios, and what the steps changed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from agents.pipeline import Update
from agents.report.document import document
from agents.report.html import Html, join, small_print, tag
from lmgym.env import Finish
from lmgym.io import printable

WIDE = 2
"""Passes over the rows that a terminal shows: the first and the last."""
FIGURES = {
    "score/mean": "mean score {}",
    "kl/sequence_nats": "KL to the reference {} nats per completion",
    "policy/clip_fraction": "{} of the tokens clipped",
    "policy/approx_kl_nats": "KL(old ‖ new) {} nats per token",
    "value/explained_variance": "explained variance of the critic {}",
}
"""The metrics of the update that are shown, where the algorithm has them."""
CSS = """
.numbers td, .numbers thead th { padding-left: 16px }
.numbers td.text { white-space: pre-wrap }
/* The token stays in view when the columns scroll. */
.numbers td:nth-child(2), .numbers thead th:nth-child(2) { position: sticky; left: 0; background: var(--paper);
  text-align: left; padding-right: 8px; z-index: 1; box-shadow: 1px 0 var(--rule) }
@media (max-width: 720px) {
  .numbers td, .numbers thead th, .numbers td.text { padding-left: 9px; font-size: 12px }
}
"""


@dataclass(frozen=True)
class Sheet:
    """A table of one completion, a row for each token.

    Attributes:
        title: what it shows.
        names: of the columns.
        rows: the cells, as text; the second one of each is the text of the token.
        notes: what the columns mean.
    """

    title: str
    names: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str]


@dataclass(frozen=True)
class Walk:
    """What is shown of an update.

    Attributes:
        title: one line.
        facts: lines about the whole update.
        completions: of each row that is shown, a heading and its tables.
    """

    title: str
    facts: Sequence[str]
    completions: Sequence[tuple[str, str, Sequence[Sheet]]]


def walk_through(
    update: Update,
    name: str,
    rows: Sequence[int] = (),
    logged: Mapping[str, object] | None = None,
    most_passes: int | None = None,
) -> Walk:
    """What is shown of an update.

    Args:
        update: the update.
        name: of the algorithm.
        rows: those of the rollout to show; by default, those with the best and the worst score that a step used.
        logged: the metrics that the run itself wrote for this update; None if it has not made it yet.
        most_passes: the first and the last of more passes than this are shown; None shows all.

    Raises:
        ValueError: there is no such row, or no step used it.
    """
    used = {int(row): place for place, row in enumerate(update.rows)}
    for row in rows:
        if row not in used:
            why = "no step used it" if 0 <= row < update.rollout.rows else "there is no such row"
            raise ValueError(f"row {row} cannot be shown: {why}. Choose from {', '.join(map(str, sorted(used)))}")
    chosen = rows or _extremes(update)
    sheets = [
        (
            _heading(update, row),
            _text(update, row),
            [_rewards(update, row, used[row]), _steps(update, used[row], row, most_passes)],
        )
        for row in chosen
    ]
    return Walk(f"Update {update.number} of {name}", [*_facts(update), *_compared(update, logged)], sheets)


def _extremes(update: Update) -> list[int]:
    score = torch.nan_to_num(update.rollout.score[update.rows.to(update.rollout.score.device)])
    best, worst = int(update.rows[int(score.argmax())]), int(update.rows[int(score.argmin())])
    return [best, worst] if best != worst else [best]


def _facts(update: Update) -> Iterator[str]:
    rollout, batch, row = update.rollout, update.batch, update.metrics
    steps = int(row.get("optimizer/steps", 0))
    used = "" if len(batch) == rollout.rows else f", of which the steps use {len(batch)}"
    passes = len(update.passes)
    yield (
        f"{rollout.rows} completions{used}, {int(batch.mask.sum())} tokens; {_count(steps, 'step')} in "
        f"{_count(passes, 'pass', 'passes')} over them, learning rate {row.get('optimizer/lr', math.nan):.3g}"
    )
    shown = "; ".join(text.format(f"{row[name]:.3f}") for name, text in FIGURES.items() if name in row)
    yield shown.replace("-", "−")
    moved, advantage = (update.after - batch.logp)[batch.mask], batch.advantages[batch.mask]
    up, down = advantage > 0, advantage < 0
    if update.has_advantages:
        yield (
            f"Of {_count(int(up.sum()), 'token')} with A > 0, {int((moved[up] > 0).sum())} are more probable after the "
            f"steps; of {_count(int(down.sum()), 'token')} with A < 0, {int((moved[down] < 0).sum())} are less probable"
        )
    else:
        yield (
            "This algorithm has no advantages: the steps imitate whole completions. Of "
            f"{_count(len(moved), 'token')}, {int((moved > 0).sum())} are more probable after them"
        )
    if not update.has_critic:
        yield "This algorithm has no critic, so there are no values"
    if not update.clips:
        yield "This algorithm clips nothing: every token pushes at every step"


def _compared(update: Update, logged: Mapping[str, object] | None) -> list[str]:
    """Whether the update is the one that the run logged."""
    if logged is None:
        return ["The run has not made this update yet, so there is nothing to compare with"]
    pairs = [(name, value, logged.get(name)) for name, value in update.metrics.items()]
    differ = [
        f"{name} {value:.6g} instead of {was:.6g}"
        for name, value, was in pairs
        if isinstance(was, (int, float)) and not math.isclose(value, was, rel_tol=1e-6, abs_tol=1e-9)
    ]
    if not differ:
        return ["All its figures are those of metrics.jsonl: this is the update that the run made"]
    return [
        f"{len(differ)} of {len(pairs)} figures differ from metrics.jsonl ({'; '.join(differ[:2])}): versions, "
        "hardware, threads or files have changed since"
    ]


def _heading(update: Update, row: int) -> str:
    score, finish = float(update.rollout.score[row]), Finish(int(update.rollout.finish[row]))
    end = "reached the token budget" if finish == Finish.LENGTH else "ended by itself"
    return f"Row {row}: score {score:.3f}, {_count(int(update.rollout.is_action[row].sum()), 'token')}, {end}"


def _text(update: Update, row: int) -> str:
    env = update.setup.env
    return f"{env.prompts[row].text}|{env.completions([row])[0].text}"


def _rewards(update: Update, row: int, place: int) -> Sheet:
    """From the rollout to the advantages."""
    rollout, batch, beta = update.rollout, update.batch, update.rollout.beta
    kl = (rollout.logp - rollout.reference_logp)[row]
    paid = update.setup.env.kl == "sampled"
    columns = {"π_old": _numbers(rollout.logp[row].exp(), "{:.3f}"), "KL": _numbers(kl)}
    if paid:
        columns["−β·KL"] = _numbers(-beta * kl, "{:+.3f}")
        columns["score"] = _numbers(rollout.rewards[row] + beta * kl)
    columns["reward"] = _numbers(rollout.rewards[row])
    notes = ["π_old: the probability with which the token was drawn. KL: log π_old − log π_ref, in nats."]
    if paid:
        notes.append(f"reward = score − β·KL, with β = {beta:.3g}; only the last token has a score.")
    else:
        notes.append("The reward is the score alone, paid at the last token: the KL is in the loss, or nowhere.")
    if update.has_critic:
        columns["value"], columns["return"] = _numbers(batch.values[place]), _numbers(batch.returns[place])
        notes.append("value: what the critic expected before the token. return: what it should have expected.")
    if update.has_advantages:
        columns["A"] = _numbers(batch.advantages[place])
        notes.append("A: the advantage, as the loss gets it (whitened over the rollout, if the algorithm does that).")
    return _sheet("From tokens to advantages", update, row, columns, notes)


def _steps(update: Update, place: int, row: int, most_passes: int | None) -> Sheet:
    """From the advantages to the new probabilities."""
    batch = update.batch
    columns = {"A": _numbers(batch.advantages[place])} if update.has_advantages else {}
    numbered = list(enumerate(update.passes))
    shown = numbered if most_passes is None or len(numbered) <= most_passes else [numbered[0], numbered[-1]]
    for number, one in shown:
        place_of = f" {number + 1}" if len(numbered) > 1 else ""
        ratio = _numbers((one.logp - batch.logp)[place].exp(), "{:.3f}")
        if one.clipped is not None:
            ratio = [f"{r}*" if c == 1 else f"{r} " for r, c in zip(ratio, one.clipped[place].tolist(), strict=True)]
        columns[f"ρ{place_of}"], columns[f"push{place_of}"] = ratio, _numbers(one.push[place])
    old, new = batch.logp[place].exp(), update.after[place].exp()
    columns |= {"π_old": _numbers(old, "{:.3f}"), "π_new": _numbers(new, "{:.3f}"), "×": _numbers(new / old, "{:.2f}")}
    notes = ["ρ: π/π_old when the step used the row. push: −∂loss/∂log π of the token, by the algorithm's own loss."]
    if update.clips:
        notes.append("*: ρ is outside the clip range. With A > 0 above it, or A < 0 below it, push is 0.")
    notes.append("π_new: after the last step of the update. ×: π_new / π_old.")
    if len(shown) < len(numbered):
        notes.append(f"The first and the last of {len(numbered)} passes are shown; --html shows all.")
    used = ", ".join(str(int(one.step[place]) + 1) for _, one in shown)
    total = int(update.metrics.get("optimizer/steps", 0))
    title = f"From advantages to new probabilities (used by {'step' if len(shown) == 1 else 'steps'} {used} of {total})"
    return _sheet(title, update, row, columns, notes)


def _sheet(title: str, update: Update, row: int, columns: Mapping[str, Sequence[str]], notes: Sequence[str]) -> Sheet:
    texts = update.token_texts(row)
    numbers = [str(i) for i in range(len(texts))]
    cells = [numbers, texts, *(column[: len(texts)] for column in columns.values())]
    return Sheet(title, ["", "token", *columns], list(zip(*cells, strict=True)), notes)


def _numbers(values: Tensor, form: str = "{:+.2f}") -> list[str]:
    """Numbers as text; rounding error has no sign, and what does not exist is a dash."""
    shown = ["–" if math.isnan(value) else form.format(value) for value in values.tolist()]
    zeros = {form.format(0.0), form.format(-0.0)}
    return ["0" if text in zeros and "+" in form else text.replace("-", "−") for text in shown]


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def print_walk(walk: Walk, console: Console) -> None:
    """Prints a walk; the tables fit into 80 columns."""
    console.print(Text(walk.title, "bold"))
    for fact in walk.facts:
        console.print(Text(printable(fact)))
    for completion, (heading, text, sheets) in enumerate(walk.completions):
        console.print()
        console.print(Text(heading, "bold"))
        console.print(Text(printable(text)))
        for sheet in sheets:
            table = Table(box=None, padding=(0, 1, 0, 0), title=sheet.title, title_justify="left")
            for place, name in enumerate(sheet.names):
                table.add_column(
                    name, justify="left" if place == 1 else "right", no_wrap=True, max_width=12 if place == 1 else None
                )
            for row in sheet.rows:
                table.add_row(
                    *(Text(printable(repr(cell)[1:-1] if place == 1 else cell)) for place, cell in enumerate(row))
                )
            console.print()
            console.print(table)
            for note in () if completion else sheet.notes:
                console.print(Text(note, "dim"))


def as_page(walk: Walk, folder: str) -> str:
    """The walk as one HTML file, which loads nothing and runs no script."""
    sections: list[tuple[str, str, object]] = [
        ("update", "The update", tag("ul", *(tag("li", fact) for fact in walk.facts)))
    ]
    sections += [
        (f"row-{i}", heading, join(tag("div", text, class_="text prompt"), *map(_html_table, sheets)))
        for i, (heading, text, sheets) in enumerate(walk.completions)
    ]
    return document("lmgym step", walk.title, [tag("span", folder)], sections, walk.title, CSS)


def _html_table(sheet: Sheet) -> Html:
    head = tag("tr", *(tag("th", name, scope="col") for name in sheet.names))
    body = [
        tag("tr", *(tag("td", cell, class_="text" if place == 1 else None) for place, cell in enumerate(row)))
        for row in sheet.rows
    ]
    table = tag("table", tag("thead", head), tag("tbody", *body), class_="numbers")
    return join(
        tag("h3", sheet.title),
        tag("div", table, class_="wide", tabindex=0, role="region", aria_label=sheet.title),
        *(small_print(n) for n in sheet.notes),
    )
