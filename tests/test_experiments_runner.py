"""Cells run in worker processes: one row for each, whatever they do, and the same rows after any kill."""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agents.experiments import Cell, Progress, Shard, Workers, merge_results, read_results, run_cells
from agents.experiments.results import ResultFile, Row

RUN = "trivial_cells:run"
TWO = Workers(jobs=2)
TIMES = ("started", "seconds", "cpu_seconds", "deaths", "jobs")


def cell(index: int = 0, agent: str = "ppo", **config: Any) -> Cell:
    return Cell("suite", "Tree", agent, index, config, {"beta": 0.1})


def outcome(rows: Sequence[Row]) -> list[Row]:
    """Rows without what differs from run to run."""
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in sorted(rows, key=lambda row: row["key"])]
    return [row | {"result": {**row["result"], "pid": 0}} if row["result"] else row for row in kept]


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_key_is_a_hash_of_all_that_decides_the_result() -> None:
    one = Cell("suite", "Tree", "ppo", 0, {"lr": 0.1, "rows": 4}, {"model": "tiny"})
    same = Cell("suite", "Tree", "ppo", 0, {"rows": 4, "lr": 0.1}, {"model": "tiny"})
    others = [
        Cell("other", "Tree", "ppo", 0, one.config, one.setting),
        Cell("suite", "Bandit", "ppo", 0, one.config, one.setting),
        Cell("suite", "Tree", "grpo", 0, one.config, one.setting),
        Cell("suite", "Tree", "ppo", 1, one.config, one.setting),
        Cell("suite", "Tree", "ppo", 0, {"lr": 0.2, "rows": 4}, one.setting),
        Cell("suite", "Tree", "ppo", 0, one.config, {"model": "probe"}),
        Cell("suite", "Tree", "ppo", 0, one.setting, one.config),
    ]
    assert one.key == same.key == Cell.from_data(json.loads(json.dumps(one.as_data()))).key
    assert len({one.key, *(other.key for other in others)}) == 8
    assert one.key == "5a3e6215933546ee1496", "a key never changes: rows would be lost"
    assert one.seed == others[2].seed != others[1].seed, "the same seed for every agent, another for each task"


@pytest.mark.parametrize("parts", [2, 3, 10])
def test_shards_are_equal_parts_and_a_cell_keeps_its_own(parts: int) -> None:
    cells = [cell(i, agent) for agent in ("ppo", "grpo", "rloo", "a2c") for i in range(10)]
    shards = [Shard(number, parts) for number in range(1, parts + 1)]
    held = [[c for c in cells if shard.holds(c)] for shard in shards]
    assert sorted(c.key for part in held for c in part) == sorted(c.key for c in cells)
    assert max(map(len, held)) - min(map(len, held)) <= 4
    assert len({shard.name for shard in shards}) == parts
    if parts == 10:
        assert [len(part) for part in held] == [4] * 10


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "-1/3", "1/0", ""])
def test_wrong_shards_are_refused(text: str) -> None:
    assert Shard.parse("2/3") == Shard(2, 3)
    with pytest.raises(ValueError, match="shard "):
        Shard.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"study": ""}, "study of a cell is ''"),
        ({"index": -1}, "index of a cell is -1"),
        ({"index": True}, "index of a cell is True"),
        ({"config": {"lr": float("nan")}}, "config of suite: ppo on Tree, seed 0 must be JSON data"),
        ({"setting": {"path": Path()}}, "setting of suite: ppo on Tree, seed 0 must be JSON data"),
    ],
)
def test_wrong_cells_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Cell(**({"study": "suite", "task": "Tree", "agent": "ppo", "index": 0} | fields))


def test_every_cell_ends_in_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A result, an exception, an exit, a death, a hang, an invalid result: the others go on."""
    cells = [
        cell(0),
        cell(1, **{"raise": "no reward"}),
        cell(2, die=True),
        cell(3, hang=True),
        cell(4, exit=7),
        cell(5, **{"return": "nan"}),
        cell(6, **{"return": "lambda"}),
        cell(7, **{"return": "list"}),
        *(cell(i) for i in range(8, 12)),
    ]
    seen: list[Progress] = []
    options = Workers(jobs=2, time_limit=1.0)
    rows = run_cells(cells, RUN, tmp_path, options, report=seen.append)

    assert [row["status"] for row in rows] == ["ok", "error", "died", "timeout", *["error"] * 4, *["ok"] * 4]
    assert [row["key"] for row in rows] == [c.key for c in cells]
    for row, text in zip(
        rows[1:8],
        ["ValueError: no reward", "died 3 times, the last time by SIGKILL", "longer than 1 s", "SystemExit: 7",
         "finite numbers: Out of range", "JSON data, with finite numbers", "must be a dict, but it is list"],
        strict=True,
    ):  # fmt: skip
        assert text in row["error"]
        assert row["result"] is None
    assert len({row["result"]["pid"] for row in rows if row["result"]}) < 8, "workers are used again"
    row = rows[0]
    assert row["result"]["score"] == random.Random(cells[0].seed).random(), "the generators are seeded"
    assert row["result"]["threads"] == "1"
    assert (row["threads"], row["jobs"], row["seed"], row["function"]) == (1, 2, cells[0].seed, RUN)
    assert {"torch", "python", "lmgym"} <= set(row["versions"])
    assert row["hardware"]
    assert row["revision"]
    assert "torch threads: 1" in row["hardware"]
    assert row["cpu_seconds"] < row["seconds"] + 1
    assert [(p.done, p.total) for p in seen] == [(n, 12) for n in range(1, 13)]
    assert (seen[-1].failed, seen[-1].seconds_left) == (7, 0.0)
    assert outcome(read_results(tmp_path)) == outcome(rows)

    log = (tmp_path / "results.log").read_text()
    assert "cell 11" in log
    assert capfd.readouterr().out == "", "what cells print is in the log"
    (child,) = re.findall(r"child (\d+)", log)
    assert not is_running(int(child)), "what a cell started ends with it"

    before = (tmp_path / "results.jsonl").read_bytes()
    assert outcome(run_cells(cells, RUN, tmp_path, options)) == outcome(rows), "what is done is skipped, failed or not"
    assert (tmp_path / "results.jsonl").read_bytes() == before

    assert run_cells(cells[1:2], RUN, tmp_path, options, retry_failed=True)[0]["status"] == "error"
    assert len((tmp_path / "results.jsonl").read_bytes().splitlines()) == 13
    assert len(read_results(tmp_path)) == 12


def test_progress_is_shown(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("w+") as out:
        run_cells([cell(i, "[/my] agent") for i in range(3)], RUN, tmp_path, console=Console(file=out, width=120))
        out.seek(0)
        lines = out.read().splitlines()
    assert len(lines) == 3
    assert re.fullmatch(r"cells 3/3  suite: \[/my\] agent on Tree, seed 2: ok, \d s, 0 s left", lines[-1])
    with (tmp_path / "terminal.txt").open("w") as out:
        run_cells([cell(5, "[/my] agent")], RUN, tmp_path, console=Console(file=out, force_terminal=True))


def test_a_function_that_cannot_run_is_refused(tmp_path: Path) -> None:
    for function, message in (
        ("trivial_cells", "must be MODULE:FUNCTION"),
        ("no_such_module:run", "cannot import 'no_such_module:run': ModuleNotFoundError"),
        ("trivial_cells:no", "cannot import 'trivial_cells:no': AttributeError"),
    ):
        with pytest.raises(ValueError, match=message):
            run_cells([cell()], function, tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == b""
    with pytest.raises(ValueError, match="the cell is given twice: suite: ppo on Tree, seed 0"):
        run_cells([cell(), cell()], RUN, tmp_path)
    wrong: list[dict[str, Any]] = [{"jobs": 0}, {"threads": 0}, {"time_limit": -1.0}, {"time_limit": float("inf")}]
    for settings in wrong:
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* must be at least"):
            Workers(**settings)


def test_shards_merge_to_the_single_run(tmp_path: Path) -> None:
    cells = [cell(i, agent) for agent in ("ppo", "grpo") for i in range(3)]
    whole = run_cells(cells, RUN, tmp_path / "whole", TWO)
    for number in (1, 2):
        run_cells(cells, RUN, tmp_path / f"machine{number}", shard=Shard(number, 2))
    rows = merge_results([tmp_path / "machine1", tmp_path / "machine2" / "results-2-of-2.jsonl"], tmp_path / "m.jsonl")
    assert outcome(rows) == outcome(whole)
    assert outcome(read_results(tmp_path / "m.jsonl")) == outcome(whole)
    assert [(row["agent"], row["index"]) for row in rows] == [(a, i) for a in ("grpo", "ppo") for i in range(3)]
    # All that is done in a folder is skipped, in whichever file it is.
    (tmp_path / "machine2" / "results-2-of-2.jsonl").rename(tmp_path / "machine1" / "other.jsonl")
    assert outcome(run_cells(cells, RUN, tmp_path / "machine1")) == outcome(whole)
    assert (tmp_path / "machine1" / "results.jsonl").read_bytes() == b""
    assert not (tmp_path / "machine1" / "results.log").exists(), "no worker was started"

    with pytest.raises(ValueError, match=r"m.jsonl, line 1: a second result of the same cell \(suite: grpo on Tree, "):
        read_results([tmp_path / "whole", tmp_path / "m.jsonl"])
    with pytest.raises(ValueError, match="is in a folder that is merged"):
        merge_results([tmp_path / "whole"], tmp_path / "whole" / "all.jsonl")


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """A file of two rows, one of them failed, written without workers."""
    file = ResultFile(tmp_path / "results.jsonl")
    for i, status in enumerate(("ok", "error")):
        result = {"score": 1.0} if status == "ok" else None
        file.append({"key": cell(i).key, **cell(i).as_data(), "status": status, "error": "", "result": result})
    file.close()
    return tmp_path / "results.jsonl"


def test_a_line_that_a_kill_tore_is_ignored_and_repaired(rows_file: Path) -> None:
    whole, rows = rows_file.read_bytes(), read_results(rows_file)
    assert len(rows) == 2
    for torn in (whole[:40], whole[:-1].splitlines()[0][:-1], b"\0" * 20, "é".encode()[:1]):
        rows_file.write_bytes(whole + torn)
        assert read_results(rows_file) == rows
        ResultFile(rows_file).close()
        assert rows_file.read_bytes() == whole
    rows_file.write_bytes(whole[:-1])
    assert read_results(rows_file) == rows[:1]


def test_of_several_rows_of_a_cell_the_result_counts(rows_file: Path) -> None:
    ok, failed = rows_file.read_bytes().splitlines(keepends=True)
    failed_first = failed.replace(b'"error":""', b'"error":"first"')
    good = failed.replace(b'"status":"error"', b'"status":"ok"').replace(b'"result":null', b'"result":{}')
    for lines, status, error in (
        ([failed_first, failed], "error", ""),
        ([failed_first, good], "ok", ""),
        ([good, failed_first], "ok", ""),
    ):
        rows_file.write_bytes(b"".join([ok, *lines]))
        (row,) = [row for row in read_results(rows_file) if row["index"] == 1]
        assert (row["status"], row["error"]) == (status, error)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"index":0', '"index":5', "line 1: no row of results: its key is '.*', but its fields give '.*': they were"),
        ('"beta":0.1', '"beta":0.2', "they were changed"),
        ('"status":"ok"', '"status":"fine"', "its status is 'fine', and must be one of ok, error, died, timeout"),
        ('"result":{"score":1.0}', '"result":null', "its status is 'ok', but it has no result"),
        ('"score":1.0', '"score":NaN', "NaN is not a JSON number"),
        ('"agent"', '"actor"', "lacks the field 'agent'"),
        ('{"agent"', '["agent"', "line 1: no row of results"),
    ],
)
def test_damaged_rows_are_refused(rows_file: Path, old: str, new: str, message: str) -> None:
    text = rows_file.read_text()
    assert old in text
    rows_file.write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=message) as error:
        read_results(rows_file.parent)
    assert "Remove the line, and run its cell again" in str(error.value)


def test_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        read_results(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"no \.jsonl files in this folder"):
        read_results([tmp_path])


CELLS = [cell(i, seconds=0.05, **({"raise": "no"} if i == 3 else {})) for i in range(12)]


def run_all(folder: Path, cells: Sequence[Cell] = CELLS) -> None:
    run_cells(cells, RUN, folder, TWO)


@pytest.fixture(scope="module")
def parents() -> Any:
    """A way to start processes that have imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["agents.experiments.runner"])
    return context


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("unhurt")
    run_all(folder)
    return outcome(read_results(folder))


def rows_in(folder: Path) -> int:
    path = folder / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def workers_in(folder: Path) -> set[int]:
    """The worker processes that have begun a cell."""
    log = folder / "results.log"
    return set(map(int, re.findall(r"worker (\d+)", log.read_text()))) if log.exists() else set()


def kill_parents(
    folder: Path, parents: Any, after: Sequence[int], rng: random.Random, cells: Sequence[Cell] = CELLS
) -> None:
    """Kills the run whenever it has written so many more rows, and a random moment later; then lets it end."""
    for rows in after:
        parent = parents.Process(target=run_all, args=(folder, cells))
        parent.start()
        target = rows_in(folder) + rows
        wait_until(lambda parent=parent, target=target: rows_in(folder) >= target or not parent.is_alive())
        time.sleep(rng.uniform(0, 0.08))
        parent.kill()
        parent.join()
        wait_until(lambda: not any(map(is_running, workers_in(folder))))
        with (folder / "results.jsonl").open("ab") as file:
            file.write(b'{"torn')
    run_all(folder, cells)


def test_kill_9_of_the_parent_loses_only_what_was_running(tmp_path: Path, parents: Any, unhurt: list[Row]) -> None:
    kill_parents(tmp_path, parents, [1, 2, 3], random.Random(0))
    assert outcome(read_results(tmp_path)) == unhurt
    assert rows_in(tmp_path) == len(CELLS), "no cell has two rows"
    begun = (tmp_path / "results.log").read_text().count("cell ")
    assert begun <= len(CELLS) + 3 * TWO.jobs


def test_kill_9_of_a_worker_runs_its_cell_again(tmp_path: Path, unhurt: list[Row]) -> None:
    killed: list[int] = []

    def kill_one(progress: Progress) -> None:
        workers = [child.pid for child in multiprocessing.active_children() if child.name == "lmgym-cells"]
        if progress.done in (2, 5, 6):
            killed.append(random.Random(progress.done).choice([pid for pid in workers if pid]))
            os.kill(killed[-1], signal.SIGKILL)

    run_cells(CELLS, RUN, tmp_path, TWO, report=kill_one)
    assert len(killed) == 3
    assert outcome(read_results(tmp_path)) == unhurt


def test_an_error_while_reporting_ends_the_workers(tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_cells(CELLS, RUN, tmp_path, TWO, report=fail)
    assert [child for child in multiprocessing.active_children() if child.name == "lmgym-cells"] == []
    assert len(read_results(tmp_path)) == 1


def test_one_process_writes_a_shard(tmp_path: Path) -> None:
    def again(progress: Progress) -> None:
        with pytest.raises(ValueError, match="another process is writing"):
            run_cells([cell(1)], RUN, tmp_path)
        run_cells(
            [c for c in (cell(i) for i in range(4)) if Shard(1, 2).holds(c)][:1], RUN, tmp_path, shard=Shard(1, 2)
        )

    run_cells([cell()], RUN, tmp_path, report=again)


def test_a_worker_imports_no_torch_of_its_own() -> None:
    code = "import sys, agents.experiments.worker; sys.exit(bool({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
