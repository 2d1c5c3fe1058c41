"""One section for each stage that trains: panels of its metrics, and tiles for what was measured once."""

from collections.abc import Collection, Mapping

from agents.report.charts import chart_style
from agents.report.formatting import format_number
from agents.report.html import Html, join, small_print, tag, tile
from agents.report.panels import metric_panel, score_against_kl
from agents.report.read import RunData
from agents.report.series import SMOOTH_FROM
from agents.report.titles import METRIC_TITLES, definition_of, match_pattern, stage_title
from agents.report.values import as_float, finite_values, nearly_equal

# Metrics whose names differ only in one of these endings are the same quantity and share a panel.
SPLITS = ("train", "test", "noise_free")


def stage_sections(run: RunData) -> list[tuple[str, Html]]:
    """Title and body of each stage that trains, and of the other stages together."""
    sections, others = [], []
    with chart_style():
        for stage in run.stages:
            title, body = stage_title(stage), _stage(run, stage)
            if run.is_training(stage):
                sections.append((title, body))
            else:
                others.append(tag("details", tag("summary", title), body))
    return [*sections, ("Other stages", join(*others))]


def _stage(run: RunData, stage: str) -> Html:
    rows, definitions = run.stages[stage], run.definitions_of(stage)
    score_is_gold = nearly_equal((row["gold/mean"], row.get("score/mean")) for row in rows if "gold/mean" in row)
    titles = METRIC_TITLES | ({"score/mean": "Gold score"} if score_is_gold else {})
    names = [name for name in _metric_names(run, stage) if not (score_is_gold and name == "gold/mean")]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name, names, definitions), []).append(name)

    first, more, tiles = [], [], []
    for key in sorted(groups, key=list(titles | groups).index):
        members = groups[key]
        if any(len(finite_values(rows, name)) > 1 for name in members):
            best = as_float(run.evaluation.get("best_gold")) if titles.get(key) == "Gold score" else None
            title = titles.get(key, key if len(members) > 1 else members[0])
            panel = metric_panel(rows, key, title, {n: definition_of(n, definitions) for n in members}, best)
            (first if key in titles or "{n}" in key else more).append(panel)
        else:
            for name in members:
                only = next(iter(finite_values(rows, name)), None)
                tiles.append(tile(titles.get(name, name), format_number(only)))
    return _layout(score_against_kl(rows, score_is_gold), first, more, tiles, is_smoothed=len(rows) >= SMOOTH_FROM)


def _layout(scatter: Html, first: list[Html], more: list[Html], tiles: list[Html], is_smoothed: bool) -> Html:
    parts = [scatter]
    if first:
        parts.append(tag("div", *first, class_="panels"))
    if tiles:
        parts.append(tag("dl", *tiles, class_="tiles"))
    if first + more:
        lines = "Thin lines: the metrics as logged. Thick lines: their running mean. " if is_smoothed else ""
        parts.append(small_print(lines, "A number beside a curve is its last value, unless it says otherwise."))
    if more:
        parts.append(tag("details", tag("summary", f"More metrics ({len(more)})"), tag("div", *more, class_="panels")))
    return join(*parts) or small_print("This stage logged no metrics.")


def _metric_names(run: RunData, stage: str) -> list[str]:
    """The stage's metrics as first logged; without those of a critic if the policy has none."""
    rows = run.stages[stage]
    names = dict.fromkeys(name for row in rows for name in row if name not in ("stage", "step", "seconds"))
    if has_critic(run, stage):
        return list(names)
    return [name for name in names if not name.startswith("value/")]


def has_critic(run: RunData, stage: str) -> bool:
    """Whether a stage's policy has a critic. Without one every value is 0, and so is the variance they explain."""
    if run.option("options", stage, "critic") == "none":
        return False
    explained = finite_values(run.stages[stage], "value/explained_variance")
    return any(explained) or not explained


def _group(name: str, names: Collection[str], definitions: Mapping[str, str]) -> str:
    """The panel of a metric: that of its quantity, of the score of which it is a component, or of its pattern."""
    quantity, _, split = name.partition("/")
    if split in SPLITS:
        return quantity
    if quantity == "score" and "score/mean" in names:
        return "score/mean"
    return next((pattern for pattern in definitions if "{n}" in pattern and match_pattern(pattern, name)), name)
