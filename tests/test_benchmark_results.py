"""The results of a benchmark: what is refused, who is ranked how, table, page, verification, and the command."""

import html.parser
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import cli
from agents.benchmark import verify as verification
from agents.benchmark.leaderboard import page
from agents.benchmark.league import Results
from agents.benchmark.suite import Row, Suite
from agents.benchmark.suites import find_suite
from agents.benchmark.table import live_table, markdown
from agents.benchmark.verify import Rerun, judge, verify
from agents.experiments import Cell, merge_results, statistics
from agents.experiments.cells import canonical

ROWS = tuple(
    Row(
        f"Task{t}", "lmgym/Tree-v0", f"capability {t}", "gold" if t % 2 else "objective", tokens=1000, passes=4000,
        beta=0.1, reference=0.2, best=0.7, max_kl=3.0 if t == 1 else None,
    )
    for t in range(10)
)  # fmt: skip
SUITE = Suite("made-up", ROWS)


def result(cell: Cell, gold: float, *, kl: float = 0.5, backward: int = 1000) -> dict[str, Any]:
    """A row of results whose curve rises to a gold score; its first evaluation is at the reference's level."""
    start = dict.fromkeys(("tokens", "forward", "backward", "cpu_seconds", "kl", "length"), 0.0)
    start |= {"gold": 0.2, "score": 0.2, "distinct_2": 0.5}
    middle = start | {"tokens": 500, "forward": 900, "backward": backward // 2, "gold": (0.2 + gold) / 2, "kl": kl / 2}
    end = start | {"tokens": 1000, "forward": 1800, "backward": backward, "gold": gold, "kl": kl, "cpu_seconds": 2.0}
    row: dict[str, Any] = {"key": cell.key, **cell.as_data(), "seed": cell.seed, "status": "ok", "error": ""}
    row |= {"result": {"curve": [start, middle, end]}, "cpu_seconds": 2.5, "revision": "abc", "hardware": "a machine"}
    return json.loads(json.dumps(row))


def failed(cell: Cell, error: str = "Traceback\nValueError: no <reward>") -> dict[str, Any]:
    return result(cell, 0.5) | {"status": "error", "result": None, "error": error}


def cells(agent: str, seeds: int, suite: Suite = SUITE, spec: str = "") -> list[Cell]:
    return [
        Cell(suite.name, row.name, agent, i, {"spec": spec or agent}, {"suite": suite.hash, "row": row.as_data()})
        for i in range(seeds)
        for row in suite.rows
    ]


def gold_of(level: float) -> Callable[[Cell], float]:
    """A noisy gold score that is the same for the same cell."""
    return lambda cell: level + 0.02 * float(np.random.default_rng(cell.seed).normal())


def results_of(levels: dict[str, float], seeds: int = 5, **more: Any) -> list[dict[str, Any]]:
    return [result(c, gold_of(level)(c), **more) for agent, level in levels.items() for c in cells(agent, seeds)]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{canonical(row)}\n" for row in rows))
    return str(path)


GOOD = {"strong": 0.65, "weak": 0.45, "reference": 0.2, "random": 0.1}


def test_ranks_headlines_and_differences() -> None:
    results = Results(results_of(GOOD))
    assert [s.agent for s in results.standings] == ["strong", "weak", "reference", "random"]
    assert [s.agent for s in results.ranked] == ["strong", "weak"], "baselines are shown, and not compared"
    strong = results.standings[0]
    by_hand = {
        row.name: {
            cell.index: (gold_of(0.65)(cell) - (0.05 if row.metric == "objective" else 0.0) - 0.2) / 0.5
            for cell in cells("strong", 5)
            if cell.task == row.name
        }
        for row in ROWS
    }
    for task, seeds in by_hand.items():
        assert strong.scores[task] == pytest.approx(seeds)
    assert results.mean(strong) == pytest.approx(statistics.suite_mean(strong.scores))
    assert results.mean(strong).value == pytest.approx(0.85, abs=0.02)
    (difference,) = results.differences
    assert (difference.one, difference.other) == ("strong", "weak")
    assert difference.paired.value == pytest.approx(0.4), "the same noise: pairs differ by exactly 0.2 / 0.5"
    assert strong.command == "lmgym benchmark made-up --agents strong --seeds 5"


def test_the_league_of_equal_compute_reads_an_earlier_evaluation() -> None:
    results = Results(results_of({"dear": 0.6}, backward=1200) + results_of({"cheap": 0.5}, backward=1000))
    dear, cheap = results.standings
    assert (dear.agent, cheap.agent) == ("dear", "cheap")
    assert results.mean(cheap, "passes").value == results.mean(cheap).value, "1800 + 2 · 1000 is within 4000"
    assert results.mean(dear, "passes").value == pytest.approx(results.mean(dear).value / 2, abs=0.03)


def test_a_task_separates_by_a_permutation_test_after_holm() -> None:
    found = Results(results_of({"a": 0.60, "b": 0.50, "c": 0.505}, seeds=8)).separations
    for pairs in found.values():
        assert {(one, other) for one, other, _, _ in pairs} == {("a", "b"), ("a", "c")}
        assert all(by == pytest.approx(0.2, abs=0.011) and p < 0.01 for _, _, by, p in pairs)
    few = Results(results_of({"a": 0.60, "b": 0.50}, seeds=4)).separations
    assert not any(few.values()), "with four seeds the smallest p-value is 0.029"
    close = Results(results_of({"a": 0.60, "b": 0.578}, seeds=10)).separations
    assert not any(close.values()), "a difference below 0.05 is too small"


def test_a_failed_run_counts_at_the_level_of_the_reference() -> None:
    rows = results_of({"strong": 0.65})
    lost = next(i for i, row in enumerate(rows) if row["task"] == "Task4" and row["index"] == 2)
    rows[lost] = failed(Cell.from_data(rows[lost]))
    results = Results(rows)
    (standing,) = results.standings
    assert standing.scores["Task4"][2] == 0.0
    assert len(standing.failed) == 1
    text = markdown(results)
    assert "- `strong` on Task4, seed 2: error, ValueError: no <reward>" in text
    assert "no &lt;reward&gt;" in page(results)


def test_missing_results_are_named_and_leave_whole_seeds() -> None:
    rows = results_of({"strong": 0.65}, seeds=3)
    results = Results(
        [r for r in rows if (r["task"], r["index"]) != ("Task7", 1)] + results_of({"weak": 0.45}, seeds=3)
    )
    strong = next(s for s in results.standings if s.agent == "strong")
    assert strong.seeds == 1
    assert strong.missing == ["Task7, seed 1"]
    assert "`strong` lacks 1 results, the first is Task7, seed 1; the table has its first 1 seeds" in markdown(results)
    results = Results([r for r in rows if r["task"] != "Task7"] + results_of({"weak": 0.45}, seeds=3))
    assert [s.agent for s in results.ranked] == ["weak"]
    assert "`strong` lacks 3 results, the first is Task7, seed 0; it is not in the table" in markdown(results)
    head, live = live_table(results)
    assert [row[0] for row in live] == ["weak", "strong"]
    filled = dict(zip(head, live[1], strict=True))
    assert [name for name, cell in filled.items() if not cell] == ["Task7"], "the table that fills shows what there is"


def test_a_part_of_a_suite_says_so() -> None:
    rows = results_of({"strong": 0.65}, seeds=3)
    note = "Only a part of the suite: its other tasks have no results."
    assert note not in markdown(Results(rows))
    part = Results([row for row in rows if row["task"] != "Task3"])
    assert note in markdown(part)
    assert note in page(part)
    assert f"--seeds 3 --tasks {','.join(part.suite.tasks)}`" in markdown(part), "the command that gives this table"
    assert "--tasks" not in markdown(Results(rows))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda rows: rows.clear(), "no results yet"),
        (lambda rows: rows.extend(other_suite()), r"different suites and cannot be compared: 50 of made-up \(\w+\), 9"),
        (lambda rows: rows[3]["result"].update(curve=[]), "no curve of evaluations"),
        (lambda rows: rows[3]["result"]["curve"][1].update(gold=None), "gold of an evaluation is None"),
        (lambda rows: rows[3]["result"]["curve"][1].pop("kl"), "kl of an evaluation is None"),
        (lambda rows: rows[3]["result"]["curve"][1].update(kl="2"), "kl of an evaluation is '2'"),
        (lambda rows: rows[3]["result"]["curve"].append(3), "tokens of an evaluation is None"),
        (lambda rows: rows[0]["setting"].pop("suite"), "are no benchmark"),
    ],
)
def test_what_is_refused(break_it: Callable[[list[dict[str, Any]]], None], message: str) -> None:
    rows = results_of({"strong": 0.65})
    break_it(rows)
    with pytest.raises(ValueError, match=message):
        Results(rows)


def results_of_cells(chosen: Sequence[Cell]) -> list[dict[str, Any]]:
    return [result(cell, 0.5) for cell in chosen]


def other_suite() -> list[dict[str, Any]]:
    return results_of_cells(cells("strong", 1, Suite("made-up", ROWS[:9])))


def test_files_are_checked(tmp_path: Path) -> None:
    rows = results_of({"strong": 0.65}, seeds=1)
    twice = write(tmp_path / "twice.jsonl", [*rows, rows[4]])
    with pytest.raises(ValueError, match=r"twice.jsonl, line 11: a second result of the same cell .*Task4, seed 0"):
        Results.read(twice)
    path = tmp_path / "nan.jsonl"
    path.write_text(Path(write(path, rows)).read_text().replace('"kl":0.5', '"kl":NaN', 1))
    with pytest.raises(ValueError, match=r"nan.jsonl, line 1: no row of results.*NaN"):
        Results.read(str(path))
    changed = [{**row, "config": {"spec": "better"}} for row in rows]
    with pytest.raises(ValueError, match="they were changed"):
        Results.read(write(tmp_path / "changed.jsonl", changed))


def test_two_machines_give_the_table_of_one(tmp_path: Path) -> None:
    rows = results_of(GOOD)
    write(tmp_path / "one" / "results-1-of-2.jsonl", rows[::2])
    write(tmp_path / "two" / "results-2-of-2.jsonl", rows[1::2])
    merge_results([str(tmp_path / "one"), str(tmp_path / "two")], tmp_path / "all.jsonl")
    merged = Results.read(str(tmp_path / "all.jsonl"))

    def table(results: Results) -> str:
        return markdown(results).partition("## How it was made")[0]

    assert table(merged) == table(Results(rows))


def test_the_settings_of_the_last_run_count() -> None:
    old = [row | {"started": "2026-01-01"} for row in results_of({"mine": 0.3}, seeds=3)]
    new = [result(c, 0.65) | {"started": "2026-01-02"} for c in cells("mine", 2, spec="mine.py") if c.task != "Task9"]
    results = Results([*new, *old, *results_of({"weak": 0.45}, seeds=3)])
    mine = next(s for s in results.standings if s.agent == "mine")
    assert (mine.seeds, len(mine.missing), results.left_out) == (0, 12, {"mine": 30})
    assert "- `mine`: 30 results with other settings are left out" in markdown(results)
    results = Results([*new, *old], {"mine": {"spec": "mine"}})
    assert (results.standings[0].seeds, results.left_out) == (3, {"mine": 18}), "unless the command says which"


class Page(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.circles = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if tag == "a" else []
        self.circles += tag == "circle"
        assert not any(name.startswith("on") or name == "src" for name in attributes)


def test_the_page_is_one_file_without_script() -> None:
    rows = results_of({**GOOD, "<script>": 0.5})
    text = page(Results(rows))
    found = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert {link.removeprefix("#") for link in found.links} <= set(found.ids)
    assert {f"task-{row.name}" for row in ROWS} < set(found.ids)
    assert found.circles == 5 * 5 * 11, "a dot for each of 5 seeds of 5 agents, on 10 tasks and over all"
    assert "lmgym benchmark made-up --agents strong --seeds 5" in text
    assert "url(" not in text
    assert text == page(Results(json.loads(json.dumps(rows)))), "the same rows give the same bytes"
    first = text.index('id="task-Task1"')
    assert text.index(">strong<", first) < text.index(">weak<", first) < text.index(">random<", first), "sorted"


def test_the_table_says_how_it_was_made() -> None:
    text = markdown(Results(results_of(GOOD, seeds=3)))
    assert re.search(r"\| `strong` \| 3 \| 0\.8\d \[0\.8\d, 0\.8\d\] \|", text)
    assert "`lmgym benchmark made-up --agents strong,weak,reference,random --seeds 3`" in text
    assert f"hash {SUITE.hash}" in text
    assert "revision abc" in text
    assert "a machine" in text
    assert "120 runs, 0.08 processor hours" in text
    assert "0 of 10 tasks separate two agents" in text


COMMITTED = Path(__file__).resolve().parents[1] / "docs" / "benchmark" / "text-v1"


def test_the_committed_table_is_that_of_the_committed_results() -> None:
    results = Results.read(str(COMMITTED / "results.jsonl"))
    assert results.hash == find_suite("text-v1").hash
    assert (COMMITTED / "table.md").read_text(encoding="utf-8") == markdown(results)
    assert (COMMITTED / "leaderboard.html").read_text(encoding="utf-8") == page(results)


@pytest.mark.slow
def test_a_slice_of_the_committed_results_is_confirmed() -> None:
    verdict = verify([str(COMMITTED / "results.jsonl")], cells=6, seed=0)
    assert verdict.confirmed, verdict


# Verification ---------------------------------------------------------------------------------------------------------


def reruns(*pairs: tuple[float, float | None], same: bool = False) -> list[Rerun]:
    planned = cells("strong", 2)
    return [Rerun(cell, recorded, found, same) for cell, (recorded, found) in zip(planned, pairs, strict=False)]


@pytest.mark.parametrize(
    ("made", "confirmed", "words"),
    [
        (reruns((0.5, 0.5), (0.7, 0.7), same=True), True, "to the last bit"),
        (reruns((0.50, 0.52), (0.7, 0.66), (0.6, 0.63), (0.8, 0.79)), True, "contains 0"),
        (reruns((0.8, 0.52), (0.9, 0.61), (0.9, 0.63), (0.9, 0.59)), False, "does not contain 0"),
        (reruns((0.8, 0.52), (0.9, None)), False, "1 cells failed: made-up: strong on Task1"),
        (reruns((0.5, 0.51), (0.5, 0.49)), False, "too few to tell"),
    ],
)
def test_verdicts(made: list[Rerun], confirmed: bool, words: str) -> None:
    verdict = judge(made)
    assert verdict.confirmed == confirmed
    assert words in verdict.reason


def test_verification_runs_a_sample_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cells run is replaced; an inflated file is found out."""
    suite = Suite("made-up", tuple(replace(row, id="lmgym/Bandit-v0") for row in ROWS))
    rows = [result(c, gold_of(0.4)(c)) for c in cells("reference", 3, suite)]
    asked: list[Cell] = []

    def run_again(planned: Sequence[Cell], function: str, *rest: Any, **more: Any) -> list[dict[str, Any]]:
        asked.extend(planned)
        return [result(cell, gold_of(0.4)(cell)) for cell in planned]

    monkeypatch.setattr(verification, "run_cells", run_again)
    monkeypatch.setattr(verification, "find_suite", lambda name: suite)
    honest = write(tmp_path / "honest.jsonl", rows)
    assert verify([honest], 6, seed=1).confirmed
    assert len({cell.key for cell in asked}) == 6
    better = [result(c, gold_of(0.6)(c)) for c in cells("reference", 3, suite)]
    verdict = verify([write(tmp_path / "inflated.jsonl", better)], 6, seed=1)
    assert not verdict.confirmed
    assert verdict.difference.value == pytest.approx(0.4, abs=0.01)

    with pytest.raises(ValueError, match=r"the hash \w+, and the installed one is"):
        verify([write(tmp_path / "other.jsonl", results_of({"reference": 0.4}))])
    foreign = write(tmp_path / "foreign.jsonl", [result(c, 0.5) for c in cells("ppo", 1, suite)])
    with pytest.raises(ValueError, match="agent 'ppo' here has other settings than in the results"):
        verify([foreign])
    with pytest.raises(ValueError, match="nothing to verify"):
        verify([write(tmp_path / "none.jsonl", [failed(c) for c in cells("reference", 1, suite)])])


# The command ----------------------------------------------------------------------------------------------------------

GREEDY = """
import lmgym

def make(world):
    env = world.env(1024, kl="none")
    policy = lmgym.Policy(world.model, None, critic="none")
    buffer, update = lmgym.RolloutBuffer.like(env), 0
    while True:
        lmgym.collect(policy, env, buffer, lmgym.Stream(0, update))
        update += 1
"""
CRASH = "def make(world):\n    raise RuntimeError('no idea')\n"


@pytest.mark.slow
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An agent that spends too much and one that crashes; the others go on, and nothing is lost."""
    monkeypatch.chdir(tmp_path)
    for name, text in (("greedy", GREEDY), ("crash", CRASH)):
        Path(f"{name}.py").write_text(text)
    line = ["benchmark", "text-v1", "--tasks", "Bandit", "--agents", "greedy.py,crash.py", "--seeds", "1"]
    assert cli.main(line) == 0
    folder = tmp_path / "runs" / "benchmark" / "text-v1"
    out = capsys.readouterr()
    assert "2 runs failed and count at the reference's level" in out.err
    assert "table.md" in out.out
    table = (folder / "table.md").read_text()
    assert "`greedy` on Bandit, seed 0: error, agents.benchmark.meter.BudgetSpent: the budget of 4,096" in table
    assert "`crash` on Bandit, seed 0: error, RuntimeError: no idea" in table
    assert "| `reference` | 1 | 0.00 |" in table
    assert (folder / "leaderboard.html").is_file()

    (folder / "leaderboard.html").unlink()
    assert cli.main(["benchmark", "report", str(folder / "results.jsonl"), "--out", "again"]) == 0
    assert (tmp_path / "again" / "table.md").read_text() == table, "from the rows alone"
    assert (tmp_path / "again" / "leaderboard.html").is_file()

    before = (folder / "results.jsonl").read_bytes()
    assert cli.main(line) == 0
    assert (folder / "results.jsonl").read_bytes() == before, "what is done is not run again"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["text-v9"], "no suite 'text-v9': choose from text-v1"),
        (["text-v1", "--agents", "pppo"], "no algorithm 'pppo'"),
        (["text-v1", "--tasks", "Trees"], "the suite text-v1 has no task 'Trees'"),
        (["text-v1", "--shard", "3/2"], "shard 3/2"),
        (["text-v1", "--seeds", "0"], "seeds"),
        (["verify"], "needs a results file"),
        (["report", "nothing.jsonl"], "no such file"),
        (["text-v1", "results.jsonl"], "a suite takes no files"),
    ],
)
def test_wrong_commands_are_refused(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["benchmark", *line]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_of_another_suite_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "results.jsonl", results_of({"strong": 0.5}, seeds=1))
    assert cli.main(["benchmark", "text-v1", "--agents", "ppo", "--out", str(tmp_path)]) == 2
    assert "choose another folder with --out" in capsys.readouterr().err


def test_suites_and_agents_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["benchmark"]) == 0
    out = capsys.readouterr().out
    assert "Password" in out
    assert "sb3_ppo" in out
