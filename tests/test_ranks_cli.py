"""`lmgym train` on several processes: started by --procs, torchrun or accelerate; killed, stopped, resumed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import full
from safetensors.torch import load_file

from agents import cli

COMMAND = [sys.executable, "-m", "agents.cli"]
SMALL = ["train", "Sort", "--sft.examples", "64", "--ppo.updates", "4", "--ppo.rows", "12", "--test-prompts", "16"]


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(command: Sequence[str], **environment: str) -> "subprocess.Popen[str]":
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)} | environment
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(command), env=os.environ | settings, **pipes)


def finish(process: "subprocess.Popen[str]", seconds: float = 170.0) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        said, _ = process.communicate()
        pytest.fail(f"it did not end within {seconds:g} s:\n{said}")
    return process.returncode, said


def wait_for_update(run: Path, number: int) -> None:
    """Returns when the run has logged this update of PPO."""
    file, end = run / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < end:
        if file.exists() and f'"stage": "ppo", "step": {number},' in file.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"{file} has no update {number}")


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def compare(one: Path, other: Path) -> None:
    """The same run up to rounding: parameters, metrics, figures."""
    for file in ("policy/adapter_model.safetensors", "sft/model.safetensors"):
        before, after = load_file(one / file), load_file(other / file)
        assert max(float((before[name] - after[name]).abs().max()) for name in before) < 2e-6
    first, second = rows_of(one), rows_of(other)
    assert [(row["stage"], row["step"]) for row in first] == [(row["stage"], row["step"]) for row in second]
    for row, counterpart in zip(first, second, strict=True):
        assert row.keys() == counterpart.keys()
        for name in row.keys() - {"stage", "step", "seconds"}:
            assert counterpart[name] == pytest.approx(row[name], rel=1e-3, abs=1e-4), name


# Bad input, in this process ------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_more_processes_than_cores_are_refused(
    capsys: pytest.CaptureFixture[str], no_launcher: pytest.MonkeyPatch
) -> None:
    assert "--procs 1000 is more than the" in complaint(capsys, *SMALL, "--procs", "1000")
    assert "--procs two is not a number" in complaint(capsys, *SMALL, "--procs=two")


def test_a_command_without_ranks_is_refused_under_a_launcher(
    capsys: pytest.CaptureFixture[str], no_launcher: pytest.MonkeyPatch
) -> None:
    no_launcher.setenv("RANK", "0")
    no_launcher.setenv("WORLD_SIZE", "2")
    assert "lmgym sample runs on one process, and 2 were started" in complaint(capsys, "sample")
    assert "MASTER_ADDR is not set" in complaint(capsys, *SMALL)


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str], no_launcher: pytest.MonkeyPatch) -> None:
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in values.items():
            no_launcher.setenv(name, value)
        assert f"the port of 127.0.0.1:{port} is in use" in complaint(capsys, *SMALL)


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    status, said = finish(start([*COMMAND, *SMALL, "--out", str(run)]))
    assert status == 0, said
    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["procs", full("torchrun"), full("accelerate"), full("two nodes")])
def test_the_pipeline_on_two_ranks_is_that_of_one(launcher: str, alone: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [*SMALL, "--out", str(run)]
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if launcher == "procs":
        started = [start([*COMMAND, *command, "--procs", "2"])]
    elif launcher == "torchrun":
        started = [start([*torchrun, "--standalone", "--nproc-per-node", "2", "-m", "agents.cli", *command])]
    elif launcher == "accelerate":
        options = ["--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port()), "-m", "agents.cli"]
        launch = [sys.executable, "-m", "accelerate.commands.launch", *options]
        started = [start([*launch, *command])]
    else:
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "1"]
        nodes = [*torchrun, "--nnodes", "2", "--nproc-per-node", "1", *where, "--local-addr", "127.0.0.1"]
        started = [start([*nodes, "-m", "agents.cli", *command]) for _ in range(2)]
    for process in started:
        status, said = finish(process)
        assert status == 0, said
        assert said.count("before: gold") <= 1  # rank 0 alone speaks
    compare(alone, run)
    assert json.loads((run / "config.json").read_bytes())["ranks"] == 2


@pytest.mark.slow
@pytest.mark.full
def test_two_ranks_then_one_then_two(alone: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher saves; another number of ranks continues; nothing is lost."""
    run = tmp_path / "run"
    every = ["--checkpoint-seconds", "0"]
    process = start([*COMMAND, *SMALL, "--out", str(run), "--procs", "2", *every])
    wait_for_update(run, 0)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 143, said
    assert said.count("to resume: lmgym train --resume") == 1
    done = len([row for row in rows_of(run) if row["stage"] == "ppo"])
    assert 0 < done < 4
    process = start([*COMMAND, "train", "--resume", str(run), "--procs", "1"])
    wait_for_update(run, done)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    if status == 143:  # it may have ended before the signal came
        assert "the number of ranks changed" in said
        status, said = finish(start([*COMMAND, "train", "--resume", str(run)]))  # on two ranks, as recorded
    assert status == 0, said
    compare(alone, run)


KILLS = [
    (signal.SIGKILL, 1, 0),
    *(full(how, rank, update) for how, rank, update in (
        (signal.SIGSTOP, 1, 0),
        (signal.SIGKILL, 0, 0), (signal.SIGKILL, 0, 1), (signal.SIGKILL, 1, 1), (signal.SIGKILL, 0, 2),
        (signal.SIGKILL, 1, 2), (signal.SIGKILL, 0, 1), (signal.SIGKILL, 1, 1), (signal.SIGKILL, 0, 2),
        (signal.SIGKILL, 1, 2), (signal.SIGSTOP, 0, 1),
    )),
]  # fmt: skip
"""Which signal which rank gets, once the run has logged this update."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "rank", "update"), KILLS)
def test_a_rank_that_dies_or_hangs_ends_the_run_with_a_whole_checkpoint(
    how: signal.Signals, rank: int, update: int, alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(
        [*COMMAND, *SMALL, "--out", str(run), "--procs", "2", "--rank-timeout", "8", "--checkpoint-seconds=0"]
    )
    wait_for_update(run, update)
    found = subprocess.run(["pgrep", "-P", str(process.pid), "-f", "agents.cli"], capture_output=True, text=True)
    ranks = {rank_of(int(pid)): int(pid) for pid in found.stdout.split()}
    os.kill(ranks[rank], how)
    began = time.monotonic()
    status, said = finish(process, 100)
    assert status not in (0, 3), said
    assert f"rank {rank}" in said
    assert time.monotonic() - began < 60
    status, said = finish(start([*COMMAND, "train", "--resume", str(run)]))
    assert status == 0, said
    compare(alone, run)


FAILING = """
import os

calls = 0


def judge(prompts, completions):
    global calls
    calls += 1
    if os.environ.get("FAIL") and os.environ.get("RANK") == "1" and calls > 4:
        {raise_error}
    return [float(len(completion.text)) for completion in completions]
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("raise_error", "said_so"),
    [("raise MemoryError('8 GB are missing')", "8 GB are missing"), full("raise KeyError('judge')", "KeyError")],
)
def test_a_rank_with_an_error_of_its_own_is_named_with_it(raise_error: str, said_so: str, tmp_path: Path) -> None:
    """Memory that runs out is such an error. The checkpoint is whole: the run goes on from it."""
    (tmp_path / "score.py").write_text(FAILING.format(raise_error=raise_error))
    run, command = tmp_path / "run", [*SMALL, "--reward", f"{tmp_path / 'score.py'}:judge", "--checkpoint-seconds=0"]
    began = time.monotonic()
    status, said = finish(start([*COMMAND, *command, "--out", str(run), "--procs", "2"], FAIL="yes"))
    assert status not in (0, 3), said
    assert "rank 1" in said
    assert said_so in said
    assert time.monotonic() - began < 60
    assert (run / "checkpoints").is_dir()
    status, said = finish(start([*COMMAND, "train", "--resume", str(run)]))
    assert status == 0, said
    assert [row["step"] for row in rows_of(run) if row["stage"] == "ppo"] == [0, 1, 2, 3]


def rank_of(pid: int) -> int:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return int(next(v.partition(b"=")[2] for v in variables if v.startswith(b"RANK=")))


@pytest.mark.slow
def test_ranks_that_do_not_run_the_same_are_refused_and_touch_nothing(tmp_path: Path) -> None:
    run, port = tmp_path / "run", str(free_port())

    def rank(number: int, *more: str) -> "subprocess.Popen[str]":
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(number)}
        return start([*COMMAND, *SMALL, "--out", str(run), *more], **where)

    (status, said), (other, silence) = [finish(p) for p in (rank(0), rank(1, "--ppo.lr", "0.5"))]
    assert status == other == 2
    assert "options.options.ppo.lr is 0.004 there, and 0.5 here" in said or "lr is" in said
    assert "here: rank 1" in said
    assert "Traceback" not in silence  # on a busy machine rank 1 may not learn in time that rank 0 says it
    assert not run.exists()


@pytest.mark.slow
def test_a_grid_in_two_shards_is_the_whole_grid(tmp_path: Path) -> None:
    """Two folders, as two machines would write them."""
    script = Path(__file__).resolve().parents[1] / "examples" / "slurm" / "grid.py"
    shutil.copy(script, tmp_path)
    for shard, out in (("1/2", "one"), ("2/2", "two")):
        process = subprocess.run(
            [sys.executable, "grid.py", "--shard", shard, "--out", out],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True,
        )  # fmt: skip
        assert process.returncode == 0, process.stdout + process.stderr
    merged = subprocess.run(
        [sys.executable, "grid.py", "--merge", "one", "two"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert merged.returncode == 0
    assert "4 of 4 cells" in merged.stdout
    assert "nan" not in merged.stdout
