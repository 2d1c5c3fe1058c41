"""`table.md`: the results of a benchmark as Markdown, from its rows alone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from agents.benchmark.league import SEPARATE_BY, SEPARATE_P, Results, Standing
from agents.benchmark.suite import Suite
from agents.experiments import statistics
from lmgym.registry import find_spec

LEGEND = (
    "0 is the reference, the model before training, and 1 the best attainable. The mean has a 95 % interval over "
    "seeds; a single task has none. A failed run counts 0. “Equal compute” takes the last evaluation within each "
    "task's budget of token passes."
)

PART = "Only a part of the suite: its other tasks have no results."


def markdown(results: Results) -> str:
    """The headline of each agent, each task, all pairs, and how the results were made."""
    tasks = results.suite.tasks
    head = ["agent", "seeds", "mean", "equal compute", "IQM", *tasks]
    lines = [f"# {results.suite.name}", "", LEGEND, "", _row(head), _row(["---"] * len(head))]
    lines += [_row(_cells(results, standing)) for standing in results.standings if standing.seeds]
    lines += [
        "",
        *([PART, ""] if not results.is_whole else []),
        *_incomplete(results),
        *_failed(results),
        "## Differences",
        "",
        *_differences(results),
    ]
    lines += ["## Tasks", "", *_tasks(results), "## How it was made", "", *provenance(results)]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _cells(results: Results, standing: Standing) -> list[str]:
    each = [two(sum(s.values()) / len(s)) for s in standing.scores.values()]
    iqm = two(statistics.interquartile_mean(standing.scores))
    return [
        f"`{standing.agent}`", str(standing.seeds), short(results.mean(standing)),
        short(results.mean(standing, "passes")), iqm, *each,
    ]  # fmt: skip


def short(estimate: statistics.Estimate) -> str:
    """An estimate with two decimals and its interval, if there is one."""
    if estimate.low is None or estimate.high is None:
        return two(estimate.value)
    return f"{two(estimate.value)} [{two(estimate.low)}, {two(estimate.high)}]"


def two(value: float) -> str:
    """Two decimals, and no minus before 0."""
    return f"{round(value, 2) + 0.0:.2f}"


def _incomplete(results: Results) -> list[str]:
    lines = [
        f"- `{s.agent}` lacks {len(s.missing)} results, the first is {s.missing[0]}"
        + ("; it is not in the table" if not s.seeds else f"; the table has its first {s.seeds} seeds")
        for s in results.standings
        if s.missing
    ]
    lines += [
        f"- `{agent}`: {count} results with other settings are left out" for agent, count in results.left_out.items()
    ]
    return ["Incomplete:", "", *lines, ""] if lines else []


def _failed(results: Results) -> list[str]:
    lines = [
        f"- `{s.agent}` on {row['task']}, seed {row['index']}: {row['status']}, {last_line(row['error'])}"
        for s in results.standings
        for row in s.failed
    ]
    return ["Failed runs, which count 0:", "", *lines, ""] if lines else []


def last_line(text: str) -> str:
    """The last line of a traceback, which says what happened."""
    return (text.strip().splitlines() or ["no message"])[-1].replace("|", "/")[:300]


def _differences(results: Results) -> list[str]:
    if not results.differences:
        return ["Two agents are needed for a comparison.", ""]
    lines = [
        "Mean over tasks of the paired difference, over the seeds that both have; p is adjusted for all pairs (Holm).",
        "",
        _row(["better", "other", "difference", "p", "probability of improvement"]),
        _row(["---"] * 5),
    ]
    for d in results.differences:
        p = "–" if d.p_value is None else f"{d.p_value:.2g}"
        lines.append(_row([f"`{d.one}`", f"`{d.other}`", short(d.paired), p, short(d.improvement)]))
    note = next((d.paired.note for d in results.differences if d.paired.note), "")
    return [*lines, "", *([f"Without interval: {note}.", ""] if note else [])]


def _tasks(results: Results) -> list[str]:
    head = ["task", "capability", "environment", "tokens", "β", "reference", "best", "pairs that it separates"]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in results.suite.rows:
        found = results.separations[row.name]
        best = max(found, key=lambda pair: pair[2]) if found else None
        pairs = f"{len(found)}: {best[0]} − {best[1]} = {best[2]:.2f} and others" if best else "none"
        numbers = [f"{row.tokens:,}", f"{row.beta:g}", f"{row.reference:.3g}", f"{row.best:.3g}"]
        lines.append(_row([row.name, row.capability, f"`{row.id}`", *numbers, pairs]))
    count = sum(bool(found) for found in results.separations.values())
    lines += [
        "",
        f"{count} of {len(results.suite.rows)} tasks separate two agents: a permutation test, p < {SEPARATE_P} after "
        f"Holm over all pairs, and a difference of at least {SEPARATE_BY}. Five seeds or fewer cannot reach that p for "
        "many pairs.",
        "",
    ]
    return lines


def suite_table(suite: Suite) -> str:
    """The tasks of a suite, for the documentation."""
    head = ["task", "capability", "environment", "model", "metric", "tokens", "β", "reference", "best"]
    lines = [_row(head), _row(["---"] * len(head))]
    for row in suite.rows:
        metric = "gold − β·KL" if row.metric == "objective" else "gold"
        limit = "" if row.max_kl is None else f", KL ≤ {row.max_kl:g}"
        levels = [f"{row.beta:g}", f"{row.reference:.3g}", f"{row.best:.3g}"]
        model = find_spec(row.id).model
        lines.append(_row([row.name, row.capability, f"`{row.id}`", model, metric + limit, f"{row.tokens:,}", *levels]))
    return "\n".join(lines)


def provenance(results: Results) -> list[str]:
    """Command, suite, revision, hardware and cost of the results."""
    rows = results.rows
    specs = ",".join(dict.fromkeys(row["config"]["spec"] for row in rows))
    seeds = 1 + max(row["index"] for row in rows)
    cpu = sum(row["cpu_seconds"] or 0.0 for row in rows)
    part = "" if results.is_whole else f" --tasks {','.join(results.suite.tasks)}"
    return [
        f"- `lmgym benchmark {results.suite.name} --agents {specs} --seeds {seeds}{part}`",
        f"- suite {results.suite.name}, hash {results.hash}",
        f"- revision {distinct(row.get('revision') for row in rows)}",
        f"- {distinct(row.get('hardware') for row in rows)}",
        f"- {len(rows)} runs, {cpu / 3600:.2f} processor hours",
    ]


def distinct(values: Iterable[Any]) -> str:
    """The different values, in the order in which they come."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value))


def live_table(results: Results) -> tuple[Sequence[str], list[Sequence[str]]]:
    """The table that fills while a benchmark runs: a head, and for each agent the means of what it has."""
    rows: list[Sequence[str]] = []
    for standing in results.standings:
        own: Mapping[str, list[float]] = {task: [] for task in results.suite.tasks}
        for row in standing.rows:
            own[row["task"]].append(results.score(row))
        means = [sum(scores) / len(scores) if scores else None for scores in own.values()]
        known = [mean for mean in means if mean is not None]
        shown = [two(mean) if mean is not None else "" for mean in means]
        rows.append([standing.agent, two(sum(known) / len(known)) if known else "", *shown])
    return ["agent", "mean", *results.suite.tasks], rows
