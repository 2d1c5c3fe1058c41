"""One HTML page about one run: what it reached, how it got there, and what the model says before and after.

The page is a single file that loads nothing and runs no script: its charts are inlined SVG, its selector is CSS, and
its Content-Security-Policy forbids the rest. Model output is hostile until escaped, so markup is only ever made by
`_tag`, which escapes every string that is not markup itself. The same run folder always gives the same bytes.
"""

import html
import io
import json
import math
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agents import evaluate, learner, reward_model, sft
from lmgym import files
from lmgym.jsonl import parse_json, read_lines
from lmgym.plain import quoted

Row = dict[str, Any]

_DEFINITIONS = {
    "sft": sft.METRICS,
    "reward_model": reward_model.METRICS
    | {"accuracy/noise_free": "the same on held-out comparisons, against labels without annotators' errors"},
    "evaluation": evaluate.METRICS,
}
# Of any stage that scores rollouts.
_ROLLOUT_DEFINITIONS = learner.METRICS | {
    "gold/mean": "gold score of the rollout's completions, which no learner sees, mean over rows"
}
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
_QUANTITIES = {"reward": "Reward", "kl": "KL", "value": "Value", "advantage": "Advantage"}

_INK, _MUTED, _RULE, _BLUE, _ORANGE, _TEAL = "#1f2328", "#59636e", "#d8dee4", "#1f6feb", "#bc4c00", "#0f766e"
_CURVES = (_BLUE, _ORANGE, _TEAL, "#8250df", "#9a6700", _MUTED)
_DASHES = {"-": "solid", "--": "dashed", ":": "dotted"}  # matplotlib's names and CSS's
_UPDATES = LinearSegmentedColormap.from_list("updates", ["#a8cdf5", "#1f6feb", "#0a2f6b"])
_MATPLOTLIB: dict[Any, object] = {
    "svg.hashsalt": "lmgym",
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own font
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.linewidth": 0.6,
    "axes.labelcolor": _MUTED,
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
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
}
_POINTS = 400  # a panel is some 350 pixels wide: more points are only noise and bytes
_SMOOTH_FROM = 40  # rows from which a mean line helps more than it hides
_REACH = 4  # rows that it takes in on either side; more in long runs
_ROUNDING = 1e-5  # KL in nats that is only the rounding of its logarithms


@dataclass(frozen=True)
class _Run:
    """A run folder, read."""

    config: Row
    metrics: list[Row]
    evaluation: Row
    """Empty if the run has none."""
    samples: list[Row]
    """Empty if the run has none."""
    definitions: dict[str, dict[str, str]]
    """What the run itself says of the metrics of a stage."""
    warnings: list[str]
    """What it warned of."""

    def meanings(self, stage: str) -> dict[str, str]:
        """Definitions of a stage's metrics, by name or by pattern; the run's own come first."""
        own = self.definitions.get(stage, {})
        scored = any(row["stage"] == stage and "score/mean" in row for row in self.metrics)
        return own | _DEFINITIONS.get(stage, _ROLLOUT_DEFINITIONS if scored else {}) | own


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
    run = _read(folder)
    page = folder / "report.html"
    files.write(page, _page(run))
    return page


def _read(folder: Path) -> _Run:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder of a run, the one that holds metrics.jsonl")
    for name in ("metrics.jsonl", "config.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: holds no {name}, so it is no run folder, or the run ended before it began")
    metrics = _read_rows(folder / "metrics.jsonl", _check_metrics, appended=True)
    if not metrics:
        raise ValueError(f"{folder / 'metrics.jsonl'}: no rows; the run ended before its first step")
    evaluation, samples = folder / "evaluation.json", folder / "samples.jsonl"
    return _Run(
        config=_read_object(folder / "config.json"),
        metrics=metrics,
        evaluation=_read_evaluation(evaluation) if evaluation.is_file() else {},
        samples=_read_rows(samples, _check_sample) if samples.is_file() else [],
        definitions=_read_definitions(folder / "metrics.json"),
        warnings=_read_warnings(folder / "warnings.json"),
    )


def _read_warnings(path: Path) -> list[str]:
    """What is of the right shape, as with definitions."""
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def _read_definitions(path: Path) -> dict[str, dict[str, str]]:
    """What is of the right shape: a run is worth a page whatever its definitions."""
    try:
        stages = _read_object(path)
    except (OSError, ValueError):
        return {}
    return {
        stage: {name: text for name, text in metrics.items() if isinstance(text, str)}
        for stage, metrics in stages.items()
        if isinstance(metrics, dict)
    }


def _read_rows(path: Path, check: Callable[[Row], str | None], appended: bool = False) -> list[Row]:
    """Rows of a JSON Lines file. Unlike `read_jsonl`, NaN and Infinity are let through: a diverged run holds them.

    Where lines are `appended`, the last may be one that a killed run did not finish, and is left out.
    """
    rows, lines = [], read_lines(path)
    for number, line in lines:
        try:
            row = parse_json(line)
        except ValueError as error:
            if appended and number == lines[-1][0] and not path.read_bytes().endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number}: not JSON ({error}); is the line cut short?") from error
        complaint = check(row) if isinstance(row, dict) else f"not an object but {type(row).__name__}"
        if complaint:
            raise ValueError(f"{path}, line {number}: {complaint}")
        rows.append(row)
    return rows


def _check_metrics(row: Row) -> str | None:
    if not isinstance(row.get("stage"), str):
        return "lacks 'stage', the name of a stage such as \"ppo\""
    if _float(row.get("step")) is None:
        return "lacks 'step', a number"
    wrong = [name for name, value in row.items() if name != "stage" and not _is_numeric(value)]
    return f"{quoted(wrong[0])} is {quoted(row[wrong[0]])}, not a number or null" if wrong else None


def _check_sample(row: Row) -> str | None:
    if row.get("when") not in ("before", "after"):
        return '\'when\' must be "before" or "after"'
    if not (isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str)):
        return "'prompt' and 'completion' must be strings"
    tokens = row.get("tokens", [])
    if not (isinstance(tokens, list) and all(isinstance(t, dict) and isinstance(t.get("text"), str) for t in tokens)):
        return "'tokens' must be a list of objects, each with its 'text'"
    numbers = [row.get("score"), row.get("gold"), *(token.get(name) for token in tokens for name in _QUANTITIES)]
    return None if all(map(_is_numeric, numbers)) else "scores and quantities of tokens must be numbers or null"


def _read_object(path: Path) -> Row:
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not an object but {type(value).__name__}")
    return value


def _read_evaluation(path: Path) -> Row:
    evaluation = _read_object(path)
    for when in ("before", "after"):
        metrics = evaluation.get(when, {})
        if not (isinstance(metrics, dict) and all(isinstance(value, dict | None) for value in metrics.values())):
            raise ValueError(f'{path}: {when!r} must be like {{"gold": {{"mean": 1.0, "stderr": 0.1}}}}')
    return evaluation


def _is_numeric(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _float(value: object) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer beyond the floats
        return None
    return number if math.isfinite(number) else None


class _Html(str):
    """Markup that may stand in the page as it is; any other string is escaped."""


def _tag(name: str, /, *children: object, **attributes: object) -> _Html:
    """An element. `class_` stands for the attribute class, other underscores for hyphens; None leaves one out."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    opening = f"<{name}{text}>"
    return _Html(opening if name in ("meta", "input") else f"{opening}{_join(*children)}</{name}>")


def _join(*children: object) -> _Html:
    return _Html("".join(child if isinstance(child, _Html) else _escape(child) for child in children))


def _escape(value: object) -> str:
    return html.escape(_visible(str(value)))


def _visible(text: str) -> str:
    """Shows characters that would hide, reorder or break text: U+202E, zero-width ones, NUL, lone surrogates."""
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    # Spaces of other widths count as unprintable, but show.
    if character in "\n\t" or character.isprintable() or unicodedata.category(character) == "Zs":
        return character
    return f"⟨U+{ord(character):04X}⟩"


def _number(value: object, digits: int = 3) -> str:
    number = _float(value)
    if number is None:
        return "–"
    is_plain = number.is_integer() or abs(number) >= 10**digits
    return _minus(f"{number:.0f}" if is_plain and abs(number) < 1e6 else f"{number:#.{digits}g}")


def _signed(value: object) -> str:
    number = _float(value)
    return "–" if number is None else _minus(f"{number:+.3g}") if number else "0"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _with_error(mean: float | None, stderr: float | None, percent: bool = False, sign: str = "") -> str:
    """`1.234 ± 0.021`: the error to two figures, the mean to as many decimals; to three figures without an error."""
    if mean is None:
        return "–"
    mean, unit = (100 * mean, "\N{NO-BREAK SPACE}%") if percent else (mean, "")
    if not stderr or stderr < 0:
        return ("+" if sign and mean > 0 else "") + _number(mean) + unit
    stderr = stderr * 100 if percent else stderr
    decimals = max(0, 1 - math.floor(math.log10(stderr)))
    form = f"z.{decimals}f" if decimals <= 6 else ".2g"  # a row of zeros would hide the figures
    text = f"{mean:{sign}{form}} ± {stderr:{form}}"
    return _minus(text.replace(" ", "\N{NO-BREAK SPACE}")) + unit


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _total_seconds(metrics: Sequence[Row]) -> float:
    """How long the run took. A clock that goes back was started anew: by a resumed run, or by a stage run alone."""
    total = last = 0.0
    for row in metrics:
        seconds = _float(row.get("seconds"))
        if seconds is not None:
            total += seconds - last if seconds >= last else seconds
            last = seconds
    return total


def _page(run: _Run) -> str:
    config = run.config
    paths = [str(config[name]).rstrip("/\\") for name in ("task", "model") if config.get(name)]
    title = " · ".join(re.split(r"[/\\]", path)[-1] for path in paths) or "unknown task"
    sections = [
        ("summary", "Summary", _summary(run)),
        ("warnings", "Warnings", _tag("ul", *(_tag("li", text) for text in run.warnings)) if run.warnings else ""),
        ("evaluation", "Before and after", _evaluation_table(run)),
        *((f"stage-{i}", name, body) for i, (name, body) in enumerate(_stages(run), start=1)),
        ("generations", "Generations", _generations(run.samples)),
        ("settings", "Settings and definitions", _settings(run)),
    ]
    sections = [section for section in sections if section[2]]
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", http_equiv="Content-Security-Policy", content=policy),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("meta", name="referrer", content="no-referrer"),
        _tag("title", f"{title} · seed {config.get('seed', '–')}"),
        _tag("style", _Html(_CSS + _selector_css(_quantities(run.samples)))),
    )
    header = _tag(
        "header",
        _tag("p", "lmgym run report", class_="kicker"),
        _tag("h1", title),
        _tag("p", *_facts_of_run(config), class_="facts"),
        _tag("nav", *(_tag("a", name, href=f"#{key}") for key, name, _ in sections), aria_label="Sections"),
    )
    main = _tag("main", *(_tag("section", _tag("h2", name), body, id=key) for key, name, body in sections))
    return f"<!DOCTYPE html>\n{_tag('html', head, _tag('body', header, main), lang='en')}\n"


def _facts_of_run(config: Row) -> list[_Html]:
    names = ("seed", "hardware", "started", "revision")
    facts = [(name, str(config[name])) for name in names if config.get(name) not in (None, "")]
    return [_tag("span", _tag("b", name), " ", value) for name, value in facts]


def _summary(run: _Run) -> _Html:
    before, after = (run.evaluation.get(when) or {} for when in ("before", "after"))
    has_gold = None not in (_estimate(before, "gold")[0], _estimate(after, "gold")[0])
    name = "gold" if has_gold else "score"
    (first, first_error), (last, last_error) = _estimate(before, name), _estimate(after, name)
    k1, exact = _estimate(after, "kl_nats_per_sequence"), _estimate(after, "kl_exact_nats_per_sequence")
    best = _float(run.evaluation.get("best_gold"))
    words, tiles = [], []
    if first is not None and last is not None:
        change, error = last - first, math.hypot(first_error or 0.0, last_error or 0.0)
        old, new = _with_error(first, first_error), _with_error(last, last_error)
        if abs(change) <= 2 * error:
            words += [f"Training moved the {_TITLES[name].lower()} by less than two standard errors, from "]
        else:
            words += [f"Training {'raised' if change > 0 else 'lowered'} the {_TITLES[name].lower()} from "]
        words += [f"{old} to ", _tag("b", new)]
        tiles.append(_tile(_TITLES[name], new, f"before: {old}"))
        if has_gold and best is not None and best > first:
            share = f"{_minus(f'{100 * change / (best - first):.0f}')} %"
            words += [", ", _tag("b", share), f" of the way to the best possible ({_number(best)})"]
            tiles.append(_tile("Of the way to the best", share, f"the best: {_number(best)}"))
    (kl, kl_error), kind = (k1, "k1") if exact[0] is None else (exact, "exact")
    if kl is not None:
        figure = _with_error(kl, kl_error)
        words += [", at " if words else "The policy ended ", _tag("b", figure, " nats"), f" of KL per sequence ({kind}"]
        words += [
            "" if kind == "k1" or k1[0] is None else f"; by k1, the estimate from samples: {_with_error(*k1)}",
            ")",
        ]
        tiles.append(_tile("KL to the reference", figure, f"nats per sequence, {kind}"))
    if words:
        words.append(". ")
    seconds = _duration(_total_seconds(run.metrics))
    words += ["Training took ", _tag("b", seconds), ", from the start of the run to its last step."]
    stages = [_stage_title(name) for name, rows in _by_stage(run.metrics).items() if _is_training(run, name, rows)]
    tiles.append(_tile("Time to the last step", seconds, f"{' → '.join(stages)}; what followed is not counted"))
    return _join(_tag("p", *words, class_="lead"), _tag("dl", *tiles, class_="tiles"))


def _tile(name: str, figure: str, note: str = "") -> _Html:
    return _tag(
        "div", _tag("dt", name), _tag("dd", figure), _tag("dd", note, class_="note") if note else "", class_="tile"
    )


def _estimate(metrics: Mapping[str, Any], name: str) -> tuple[float | None, float | None]:
    value = metrics.get(name) or {}
    mean, stderr = _float(value.get("mean")), _float(value.get("stderr"))
    return (0.0, 0.0) if name.startswith("kl_") and mean is not None and abs(mean) < _ROUNDING else (mean, stderr)


def _same(pairs: Iterable[tuple[object, object]]) -> bool:
    """Whether there are numbers, and each pair is one of them twice, but for the rounding of float32."""
    table = np.array([(_float(a), _float(b)) for a, b in pairs], dtype=float).reshape(-1, 2)
    table = table[np.isfinite(table).any(axis=1)]
    return bool(len(table)) and bool((np.abs(np.diff(table)) <= 1e-5 * np.abs(table).max()).all())


def _evaluation_table(run: _Run) -> _Html:
    before, after = (run.evaluation.get(when) or {} for when in ("before", "after"))
    names, meanings = sorted(before | after, key=list(_TITLES | before | after).index), run.meanings("evaluation")
    is_gold = _same((_estimate(side, "gold")[0], _estimate(side, "score")[0]) for side in (before, after))
    if is_gold:
        names.remove("score")
    if not names:
        return _Html("")
    rows = []
    for name in names:
        percent = name.endswith("_share")
        (old, old_error), (new, new_error) = _estimate(before, name), _estimate(after, name)
        change = None if old is None or new is None else new - old
        error = math.hypot(old_error or 0.0, new_error or 0.0)
        clear = change is not None and error > 0 and abs(change) > 2 * error
        cells = (
            _with_error(old, old_error, percent),
            _with_error(new, new_error, percent),
            _with_error(change, error, percent, "+"),
        )
        rows.append(
            _tag(
                "tr",
                _tag("th", _TITLES.get(name, name), scope="row", title=_meaning(meanings, name)),
                *(_tag("td", cell) for cell in cells[:2]),
                _tag("td", _tag("b", cells[2]) if clear else cells[2]),
            )
        )
    columns = _tag("tr", *(_tag("th", name, scope="col") for name in ("", "Before", "After", "Change")))
    return _join(
        _tag("table", _tag("thead", columns), _tag("tbody", *rows), class_="numbers"),
        _note(
            "The score is the gold score itself. " if is_gold else "",
            "Mean ± standard error over held-out prompts. The error of a change takes both samples as independent; "
            "bold is more than two of its errors from 0.",
        ),
    )


def _note(*children: object) -> _Html:
    return _tag("p", *children, class_="note")


def _by_stage(metrics: Sequence[Row]) -> dict[str, list[Row]]:
    stages: dict[str, list[Row]] = {}
    for row in metrics:
        stages.setdefault(row["stage"], []).append(row)
    return stages


def _stage_title(stage: str) -> str:
    return _STAGES.get(stage, stage.upper() if len(stage) <= 5 else stage.replace("_", " ").capitalize())


def _is_training(run: _Run, stage: str, rows: Sequence[Row]) -> bool:
    """Whether a stage trains; what only samples or asks is of less interest."""
    return bool(run.meanings(stage)) or any("loss/train" in row for row in rows)


def _fits(pattern: str, name: str) -> re.Match[str] | None:
    """Whether a definition's name is a metric's; {n} in it is any digits, which are group 1."""
    # Possessive, so that no pattern of a run takes long.
    return re.fullmatch(re.escape(pattern).replace(r"\{n\}", r"(\d++)"), name)


def _meaning(meanings: Mapping[str, str], name: str) -> str | None:
    return meanings.get(name) or next((text for pattern, text in meanings.items() if _fits(pattern, name)), None)


def _stages(run: _Run) -> list[tuple[str, _Html]]:
    """Title and panels of each stage that trains, and of the rest together."""
    best = _float(run.evaluation.get("best_gold"))
    sections, others = [], []
    with matplotlib.rc_context():
        # The reader's own matplotlibrc would change the bytes.
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_MATPLOTLIB)
        for name, rows in _by_stage(run.metrics).items():
            title, body = _stage_title(name), _stage(rows, best, run.meanings(name))
            if _is_training(run, name, rows):
                sections.append((title, body))
            else:
                others.append(_tag("details", _tag("summary", title), body))
    return [*sections, ("Other stages", _join(*others))]


def _group(name: str, names: Collection[str], meanings: Mapping[str, str]) -> str:
    """The panel that a metric is drawn in: of its quantity, of the score that it is a part of, or of its pattern."""
    quantity, _, split = name.partition("/")
    if split in _SPLITS:
        return quantity
    if quantity == "score" and "score/mean" in names:
        return "score/mean"
    return next((pattern for pattern in meanings if "{n}" in pattern and _fits(pattern, name)), name)


def _stage(rows: list[Row], best_gold: float | None, meanings: Mapping[str, str]) -> _Html:
    """The panels of one stage; metrics measured once are numbers instead."""
    is_gold = _same((row["gold/mean"], row.get("score/mean")) for row in rows if "gold/mean" in row)
    titles = _TITLES | ({"score/mean": "Gold score"} if is_gold else {})
    hidden = ("stage", "step", "seconds", *(("gold/mean",) if is_gold else ()))
    names = dict.fromkeys(name for row in rows for name in row if name not in hidden)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, names, meanings), []).append(name)

    first, more, tiles, smoothed = [], [], [], len(rows) >= _SMOOTH_FROM
    for key in sorted(groups, key=list(titles | groups).index):
        names = groups[key]
        if any(len(_finite(rows, name)) > 1 for name in names):
            best = best_gold if titles.get(key) == "Gold score" else None
            title = titles.get(key, key if len(names) > 1 else names[0])
            panel = _panel(rows, key, title, {name: _meaning(meanings, name) for name in names}, best)
            (first if key in titles or "{n}" in key else more).append(panel)
        else:
            tiles += [_tile(titles.get(name, name), _number(next(iter(_finite(rows, name)), None))) for name in names]
    parts = [_score_against_kl(rows, is_gold)]
    if first:
        parts.append(_tag("div", *first, class_="panels"))
    if tiles:
        parts.append(_tag("dl", *tiles, class_="tiles"))
    if first + more:
        lines = "Thin lines: the metrics as logged. Thick lines: their running mean. " if smoothed else ""
        parts.append(_note(lines, "A number beside a curve is its last value, unless it says otherwise."))
    if more:
        parts.append(
            _tag("details", _tag("summary", f"More metrics ({len(more)})"), _tag("div", *more, class_="panels"))
        )
    return _join(*parts) or _note("This stage logged no metrics.")


def _finite(rows: Sequence[Row], name: str) -> list[float]:
    return [value for row in rows if (value := _float(row.get(name))) is not None]


def _series(rows: Sequence[Row], *names: str) -> np.ndarray:
    """The step and the metrics, [n, 1 + names], of the rows that hold them all; NaN where one is not finite."""
    table = [
        [math.nan if (value := _float(row[name])) is None else value for name in ("step", *names)]
        for row in rows
        if all(name in row for name in names)
    ]
    series = np.array(table, dtype=float).reshape(len(table), 1 + len(names))
    if (np.diff(series[:, 0]) <= 0).any():
        series[:, 0] = np.arange(len(series))  # the stage ran more than once
    return series


def _thin(table: np.ndarray) -> np.ndarray:
    """Means of neighbouring rows, so that a long run still fits its panel."""
    size = math.ceil(len(table) / _POINTS)
    if size <= 1:
        return table
    return np.array([table[start : start + size].mean(axis=0) for start in range(0, len(table), size)])


def _smooth(values: np.ndarray, reach: int) -> np.ndarray:
    """Mean of the finite values within `reach` on either side: a trailing mean would lag behind."""
    finite, window = np.isfinite(values), np.ones(2 * reach + 1)
    sums, counts = (np.convolve(column, window)[reach:-reach] for column in (np.where(finite, values, 0.0), finite))
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _panel(rows: list[Row], key: str, title: str, names: Mapping[str, str | None], best: float | None) -> _Html:
    """One small chart of the metrics that share a quantity, given with their definitions."""
    figure, ax = _figure(3.6, 1.95, 4)
    scored = any("score/mean" in row for row in rows)
    latest, keys, notes, spoken = "", [], [], []
    for name, color, dashes in zip(names, cycle(_CURVES), cycle(_DASHES), strict=False):
        table = _series(rows, name)
        finite = table[np.isfinite(table[:, 1])]
        if gaps := len(table) - len(finite):
            notes.append(_tag("span", f"{gaps} of {len(table)} values are not finite"))
        if not len(finite):
            continue
        latest = _number(finite[-1, 1])
        if not scored and len(finite) >= 10:  # one minibatch says little
            latest = f"{_number(finite[-round(len(finite) / 10) :, 1].mean())} (mean of the last 10 %)"
        n = match[1] if "{n}" in key and (match := _fits(key, name)) else None
        label = f"n = {n}:" if n else name.rpartition("/")[2].replace("_", " ")
        keys.append(_key(f"{label} {latest}", color, _DASHES[dashes] if len(finite) > 1 else None))
        spoken.append(
            f"{name} goes from {_number(finite[0, 1])} to {_number(finite[-1, 1])}, "
            f"lowest {_number(finite[:, 1].min())}, highest {_number(finite[:, 1].max())}"
        )
        _draw_curve(ax, table, finite, color, dashes)
    if len(names) == 1:
        keys = []
    elif key == "score/mean":
        notes.append(_tag("span", "components are shown before their weights"))
    if best is not None:
        ax.axhline(best, color=_MUTED, linestyle=(0, (4, 3)), linewidth=0.9)
        keys.append(_key(f"best possible {_number(best)}", _MUTED, "dashed"))
    ax.set_xlabel("update" if scored else "step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    caption = _tag("figcaption", _tag("b", title), " ", _tag("span", "" if len(names) > 1 else latest, class_="latest"))
    description = "\n".join(f"{name}: {text}" for name, text in names.items() if text) or None
    below = _tag("small", *keys, *notes, class_="keys")
    return _tag("figure", caption, _svg(figure, f"{title}. {'; '.join(spoken)}"), below, title=description)


def _key(text: str, color: str, line: str | None) -> _Html:
    """An entry of a legend, below its chart, where it can cover no data; `line` is None for a lone point."""
    mark = _tag("i", style=f"border-top:2px {line} {color}") if line else _tag("i", "◆", style=f"color:{color}")
    return _tag("span", mark, text)


def _draw_curve(ax: Axes, table: np.ndarray, finite: np.ndarray, color: str, dashes: str) -> None:
    style: dict[str, Any] = {"color": color, "linestyle": dashes if len(finite) > 1 else "none", "linewidth": 1.7}
    if len(table) >= _SMOOTH_FROM:
        ax.plot(*_thin(table).T, color=color, linewidth=0.7, alpha=0.4)
        mean = np.column_stack([table[:, 0], _smooth(table[:, 1], max(_REACH, len(table) // 40))])
        ax.plot(*_thin(mean).T, **style)
    elif len(finite) == 1:
        ax.plot(*finite.T, **style, marker="D", markersize=5)
    else:
        # A line alone would hide how few values there are.
        ax.plot(*finite.T, **style, marker="o" if len(finite) <= 25 else None, markersize=3)


def _score_against_kl(rows: list[Row], is_gold: bool) -> _Html:
    """What the score cost, and whether the gold score came along: over-optimisation shows as a bend down."""
    tables = [_thin(_series(rows, "kl/sequence_nats", name)) for name in ("score/mean", "gold/mean")]
    score, gold = (table[np.isfinite(table).all(axis=1)] for table in tables)
    if len(score) < 2 or np.abs(score[:, 1]).max() < _ROUNDING:
        return _Html("")
    panels = {"gold score": score} if is_gold else {"score": score} | ({"gold score": gold} if len(gold) else {})
    last = max(1.0, score[:, 0].max())
    figures, axes = zip(*(_figure(5.2, 3.3, 6) for _ in panels), strict=True)
    for ax, (label, table) in zip(axes, panels.items(), strict=True):
        kl, values = table[:, 1], table[:, 2]
        ax.plot(kl, values, color=_RULE, linewidth=0.8, zorder=1)
        ax.scatter(kl, values, c=table[:, 0], cmap=_UPDATES, vmin=0, vmax=last, s=16, linewidths=0, zorder=2)
        for at, marker in ((0, "o"), (-1, "D")):
            ax.scatter(kl[at], values[at], s=70, marker=marker, facecolors="none", edgecolors=_INK, linewidths=1)
        # Gao et al. 2022: score grows with the root of KL. The root spreads the early updates out.
        ax.set_xscale("function", functions=(_signed_root, _signed_square))
        ax.xaxis.set_major_locator(MaxNLocator(6))
        ax.set_title(label, loc="left", fontsize=9, color=_MUTED)
        ax.margins(x=0.06, y=0.12)
        ax.set_xlabel("KL (k1) to the reference, nats per sequence (root scale)")
    low, high = (min(ax.get_xlim()[0] for ax in axes), max(ax.get_xlim()[1] for ax in axes))
    for ax in axes:
        ax.set_xlim(low, high)
    ramp = [_tag("i", style=f"background:{to_hex(_UPDATES(x))}") for x in np.linspace(0, 1, 7)]
    legend = _tag("span", "○ first, update 0 ", *ramp, f" {_number(last)}, last ◇", class_="ramp")
    charts = []
    for figure, (label, table) in zip(figures, panels.items(), strict=True):
        (_, kl, start), (_, end_kl, end) = ([_number(x) for x in table[i]] for i in (0, -1))
        charts.append(_svg(figure, f"{label} against KL: from {start} at {kl} to {end} at {end_kl} nats per sequence"))
    caption = _tag("figcaption", _tag("b", "Score against KL"), " ", legend)
    body = _tag("div", *charts, class_="panels large")
    if len(panels) == 1:
        return _tag("figure", caption, body, class_="wide half")
    aside = _tag("small", "Where the score still rises and the gold score turns down, the score is gamed.")
    return _tag("figure", caption, body, aside, class_="wide")


def _signed_root(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: np.ndarray) -> np.ndarray:
    return np.sign(x) * np.square(x)


def _figure(width: float, height: float, ticks: int) -> tuple[Figure, Axes]:
    """A figure in inches, with margins that don't depend on the labels: panels in a grid line up."""
    figure = Figure(figsize=(width, height))
    left, right, bottom, top = 0.46, 0.08, 0.42, 0.2
    ax = figure.subplots()
    figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)
    ax.yaxis.set_major_locator(MaxNLocator(ticks))
    return figure, ax


def _svg(figure: Figure, description: str) -> _Html:
    """The figure as an element of the page, without what belongs to a file of its own."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    source = file.getvalue()
    match = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>(.*)</svg>', source, re.DOTALL)
    assert match, "matplotlib wrote no <svg>"
    # Its style rule would apply to the whole page; names of groups would repeat from figure to figure.
    body = re.sub(r"<style.*?</style>", "", match[2], flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    return _tag("svg", _Html(body), viewBox=match[1], role="img", aria_label=description)


def _quantities(samples: Sequence[Row]) -> dict[str, float]:
    """The quantities that tokens have, each with the size at which its colour is full."""
    scales = {}
    for name in _QUANTITIES:
        sizes = sorted(
            abs(value)
            for row in samples
            for token in row.get("tokens", [])
            if (value := _float(token.get(name))) is not None
        )
        if sizes:
            # One wild token must not bleach the rest.
            scales[name] = sizes[math.ceil(0.98 * len(sizes)) - 1] or sizes[-1] or 1.0
    return scales


def _shade(value: float, scale: float) -> str:
    """From −1 to 1, by the root: the score at the last token dwarfs the KL at the others, and both must show."""
    return f"{math.copysign(min(1.0, math.sqrt(abs(value) / scale)), value):.2f}"


def _selector_css(scales: Mapping[str, float]) -> str:
    """Rules of the selector. Without `:has`, the page shows the first quantity."""
    if not scales:
        return ""
    first, *others = scales
    rules = [f".t{{--x:var(--{first},0)}}", f".legend-{first}{{display:flex}}"]
    for name in others:
        rules.append(f"#generations:has(#by-{name}:checked) .completion .t{{--x:var(--{name},0)}}")
        rules.append(f"#generations:has(#by-{name}:checked) .legend-{name}{{display:flex}}")
        rules.append(f"#generations:has(#by-{name}:checked) .legend-{first}{{display:none}}")
    return "\n".join(rules)


def _generations(samples: Sequence[Row]) -> _Html:
    if not samples:
        return _Html("")
    scales = _quantities(samples)
    if _same((row.get("gold"), row.get("score")) for row in samples):
        samples = [row | {"score": None} for row in samples]  # the score is the gold score itself
    prompts: dict[str, dict[str, list[Row]]] = {}
    for row in samples:
        prompts.setdefault(row["prompt"], {"before": [], "after": []})[row["when"]].append(row)
    articles, number = [], 0
    for prompt, sides in prompts.items():
        for before, after in zip_longest(sides["before"], sides["after"]):
            number += 1
            articles.append(
                _tag(
                    "article",
                    _tag("h3", f"Prompt {number}"),
                    _tag("div", prompt, class_="text prompt", dir="auto"),
                    _tag("div", _sample("Before", before, scales), _sample("After", after, scales), class_="pair"),
                )
            )
    return _join(_selector(scales) if scales else "", *articles)


def _selector(scales: Mapping[str, float]) -> _Html:
    first = next(iter(scales))
    options = [
        _tag(
            "label",
            _tag("input", type="radio", name="by", id=f"by-{name}", checked="" if name == first else None),
            _QUANTITIES[name],
        )
        for name in scales
    ]
    legends = []
    for name, scale in scales.items():
        # The shade is the root of the value, so a quarter of the scale has half of the colour.
        swatches = [
            _tag("span", text, class_="t", style=f"--x:{shade}")
            for shade, text in (
                (-1, f"≤ {_number(-scale, 2)}"),
                (-0.5, _number(-scale / 4, 2)),
                (0, "0"),
                (0.5, _number(scale / 4, 2)),
                (1, f"≥ {_number(scale, 2)}"),
            )
        ]
        legends.append(_tag("div", *swatches, class_=f"legend legend-{name}", aria_label=f"Colours of {name}"))
    return _join(
        _tag("div", _tag("fieldset", _tag("legend", "Colour tokens by"), *options), *legends, class_="selector"),
        _note(
            "Orange is below 0, blue is above. Point at a token for its numbers, or open the table below a completion. "
            "The reward is the score at the last token, less β·KL at each. KL is in nats, the others are in score."
        ),
    )


def _sample(title: str, row: Row | None, scales: Mapping[str, float]) -> _Html:
    if row is None:
        return _tag("div", _tag("h4", title), _note("No completion."), class_="completion")
    tokens = row.get("tokens", [])
    facts = [f"{name} {_number(row.get(name), 3)}" for name in ("gold", "score") if _float(row.get(name)) is not None]
    facts += [f"{len(tokens)} tokens"] if tokens else []
    facts += [f"finish: {row['finish_reason']}"] if row.get("finish_reason") else []
    text = [_token(token, scales) for token in tokens] if tokens else [row["completion"]]
    return _tag(
        "div",
        _tag("h4", title, " ", _tag("span", " · ".join(facts), class_="latest")),
        _tag("div", *text, class_="text", dir="auto"),
        _token_table(tokens, scales) if tokens and scales else "",
        class_="completion",
    )


def _token(token: Row, scales: Mapping[str, float]) -> _Html:
    shades = [
        f"--{name}:{_shade(value, scale)}"
        for name, scale in scales.items()
        if (value := _float(token.get(name))) is not None
    ]
    numbers = [f"{name} {_signed(token.get(name))}" for name in scales]
    title = "\n".join([json.dumps(token["text"], ensure_ascii=False), *numbers])
    return _tag("span", _shown(token["text"]), class_="t", style=";".join(shades), title=title)


def _shown(text: str) -> str:
    """A token's text in which a line break, a tab and nothing at all can be seen and pointed at."""
    return text.replace("\n", "↵\n").replace("\t", "⇥\t") or "∅"


def _token_table(tokens: Sequence[Row], scales: Mapping[str, float]) -> _Html:
    """The same numbers for those who can't point or can't see colours."""
    columns = _tag("tr", *(_tag("th", name, scope="col") for name in ("Token", *(_QUANTITIES[n] for n in scales))))
    rows = [
        _tag(
            "tr",
            _tag("th", _shown(token["text"]).rstrip("\n"), scope="row", class_="text"),
            *(_tag("td", _signed(token.get(name))) for name in scales),
        )
        for token in tokens
    ]
    table = _tag("table", _tag("thead", columns), _tag("tbody", *rows), class_="numbers")
    return _tag("details", _tag("summary", "Numbers of each token"), table)


def _settings(run: _Run) -> _Html:
    rows = [
        _tag("tr", _tag("th", name, scope="row"), _tag("td", _tag("code", value)))
        for name, value in _flatten(run.config)
    ]
    parts = [_tag("details", _tag("summary", "All settings"), _tag("table", _tag("tbody", *rows), class_="settings"))]
    if command := run.config.get("command"):
        parts.insert(0, _tag("pre", command))
    definitions = []
    logged = _by_stage(run.metrics) | {"evaluation": [run.evaluation.get(when) or {} for when in ("before", "after")]}
    for stage, rows in logged.items():
        names = {name for row in rows for name in row}
        known = [
            _join(_tag("dt", _tag("code", name)), _tag("dd", text))
            for name, text in run.meanings(stage).items()
            if any(_fits(name, logged_name) for logged_name in names)
        ]
        if known:
            definitions += [_tag("h3", _stage_title(stage)), _tag("dl", *known, class_="definitions")]
    if definitions:
        parts.append(_tag("details", _tag("summary", "What each metric means"), *definitions))
    return _join(*parts)


def _flatten(value: object, name: str = "") -> list[tuple[str, str]]:
    """Nested objects as dotted names, in their own order."""
    if isinstance(value, Mapping) and value:
        return [pair for key, inner in value.items() for pair in _flatten(inner, f"{name}.{key}" if name else str(key))]
    return [(name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))]


_CSS = """
:root { color-scheme: light; --ink: #1f2328; --muted: #59636e; --rule: #d8dee4; --wash: #f6f8fa; --link: #0b57c2 }
* { box-sizing: border-box }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
header, main { max-width: 1120px; margin: 0 auto; padding: 0 24px }
header { padding-top: 36px }
h1 { font-size: 30px; line-height: 1.2; margin: 0 0 8px; overflow-wrap: anywhere }
h2 { font-size: 21px; margin: 48px 0 14px; padding-top: 14px; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere }
h3 { font-size: 16px; margin: 0 0 6px }
h4 { font-size: 14px; margin: 0 0 6px; display: flex; gap: 8px; justify-content: space-between; flex-wrap: wrap }
.kicker { margin: 0 0 4px; font-size: 13px; letter-spacing: .06em; text-transform: uppercase; color: var(--muted) }
.facts { margin: 0 0 16px; color: var(--muted); font-size: 14px; overflow-wrap: anywhere }
.facts span { margin-right: 20px } .facts b { font-weight: 600; color: var(--ink) }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; font-size: 14px }
a { color: var(--link); text-decoration: none } a:hover { text-decoration: underline }
#summary h2 { border: 0; margin: 0; padding: 0; height: 1px; width: 1px; overflow: hidden; position: absolute }
.lead { font-size: 20px; line-height: 1.45; margin: 28px 0 20px; max-width: 52em }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 12px; margin: 20px 0 }
.tile { background: var(--wash); border: 1px solid var(--rule); border-radius: 8px; padding: 12px 16px }
.tile dt { font-size: 13px; color: var(--muted) }
.tile dd { margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums }
.tile dd.note { font-size: 13px; font-weight: 400 }
.note, small { color: var(--muted); font-size: 13px } p.note { margin: 8px 0 }
table { border-collapse: collapse; font-size: 15px }
.numbers { font-variant-numeric: tabular-nums }
.numbers td, .numbers thead th { text-align: right; padding: 6px 0 6px 36px; white-space: nowrap }
.numbers th:first-child { text-align: left; font-weight: 400; padding: 6px 0 }
.numbers thead th { font-weight: 600; color: var(--muted); font-size: 13px }
.numbers tr { border-bottom: 1px solid var(--rule) }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(310px, 100%), 1fr)); gap: 22px 28px }
.panels.large { grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 14px 28px }
figure { margin: 0; min-width: 0 } figure.wide { margin-bottom: 28px } figure.half { max-width: 560px }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-size: 14px;
  align-items: baseline }
figcaption b { font-weight: 600; overflow-wrap: anywhere }
.latest { color: var(--muted); font-size: 13px; font-weight: 400; font-variant-numeric: tabular-nums }
.keys { display: flex; flex-wrap: wrap; gap: 0 16px }
.keys i { display: inline-block; width: 20px; margin-right: 6px; text-align: center; font-style: normal;
  vertical-align: middle }
svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round; stroke-linecap: butt }
svg text { font-family: inherit !important }
.ramp { font-size: 13px; color: var(--muted); white-space: nowrap }
.ramp i { display: inline-block; width: 16px; height: 10px }
details { margin: 14px 0 } summary { cursor: pointer; color: var(--link); font-size: 14px; margin-bottom: 8px }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
.selector { position: sticky; top: 0; z-index: 1; background: #fff; padding: 10px 0;
  border-bottom: 1px solid var(--rule); display: flex; flex-wrap: wrap; gap: 8px 28px;
  align-items: center; justify-content: space-between; font-size: 14px }
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px }
legend { float: left; padding: 0 16px 0 0; color: var(--muted) }
label { cursor: pointer } input { margin: 0 6px 0 0; accent-color: var(--link) }
.legend { display: none; font-variant-numeric: tabular-nums; font-size: 13px }
.legend .t { min-width: 68px; text-align: center; padding: 2px 8px; border-radius: 0 }
article { border: 1px solid var(--rule); border-radius: 8px; padding: 16px 20px 8px; margin: 16px 0 }
.text { font: 14px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.prompt { background: var(--wash); border-radius: 6px; padding: 8px 12px; margin-bottom: 14px }
.pair { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px }
.completion { min-width: 0 }
.completion details { margin: 10px 0; max-height: 420px; overflow: auto }
.completion .numbers { font-size: 13px }
.completion .numbers td, .completion .numbers thead th + th { padding: 2px 0 2px 20px }
.completion .numbers th.text { font-size: 13px; padding: 2px 0; line-height: 1.4 }
.t { border-radius: 3px; padding: 1px 0; border-left: 1px solid #fff; background:
  linear-gradient(rgb(84 157 235 / max(0, var(--x))), rgb(84 157 235 / max(0, var(--x)))),
  linear-gradient(rgb(240 146 72 / max(0, 0 - var(--x))), rgb(240 146 72 / max(0, 0 - var(--x)))) }
.completion .t:hover { outline: 1.5px solid var(--ink) }
pre { background: var(--wash); border-radius: 6px; padding: 10px 14px; overflow: auto; font-size: 13px; margin: 6px 0 }
.settings th, .settings td { text-align: left; vertical-align: top; padding: 3px 28px 3px 0; font-size: 13px;
  font-weight: 400; border-bottom: 1px solid var(--rule); overflow-wrap: anywhere }
.settings th { color: var(--muted) }
.definitions { display: grid; grid-template-columns: minmax(190px, max-content) 1fr; gap: 4px 28px; font-size: 14px }
.definitions dd { margin: 0; color: var(--muted) }
@media (max-width: 720px) { .pair, .definitions { grid-template-columns: minmax(0, 1fr) }
  .numbers td, .numbers thead th { padding-left: 10px; font-size: 13px } #evaluation { overflow-x: auto }
  #evaluation th { font-size: 13px } main, header { padding-inline: 14px } }
@media print { .selector { position: static } article, figure { break-inside: avoid } }
"""
