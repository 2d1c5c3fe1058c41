"""Files are whole or not there, whatever fails while they are written: every operation in turn, as SQLite tests it."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from agents.runs import Checkpoints, Damaged, Run, read_state, write_state
from agents.training import State
from lmgym.io import atomic
from lmgym.preferences import Comparison, read_comparisons, write_comparisons

CHANGING = ("open", "write", "fsync", "close", "replace", "rename", "mkdir", "makedirs", "ftruncate")
"""The system's calls through which everything is written."""


class Killed(BaseException):
    """The process was killed here: nothing that follows runs, no handler and no clean-up."""


@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, at: int, fault: int | None) -> Iterator[list[str]]:
    """The `at`-th operation fails with an errno, or (None) kills: then it and all that follow do nothing.

    A write that fails has written half of what it was given, as on a disk that fills up.
    """
    done: list[str] = []

    def wrap(name: str) -> Callable[..., Any]:
        call = getattr(os, name)

        def wrapped(*arguments: Any, **more: Any) -> Any:
            done.append(name)
            if len(done) < at:
                return call(*arguments, **more)
            if fault is None:
                if name == "write" and len(done) == at:
                    call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                raise Killed
            if len(done) > at:
                return call(*arguments, **more)
            if name == "write":
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            if name == "close":
                call(*arguments)  # a file is closed even where closing says that it failed
            raise OSError(fault, os.strerror(fault))

        return wrapped

    fake = {name: getattr(os, name) for name in dir(os)} | {name: wrap(name) for name in CHANGING}
    dead = shutil.rmtree

    def remove(*arguments: Any, **more: Any) -> None:
        if fault is None and len(done) >= at:
            raise Killed
        dead(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "os", SimpleNamespace(**fake))
        patch.setattr(atomic, "shutil", SimpleNamespace(rmtree=remove))
        yield done


def outcome(act: Callable[[], Any]) -> BaseException | None:
    try:
        act()
    except (atomic.WriteError, Killed) as problem:
        return problem
    return None


def every_fault(
    monkeypatch: pytest.MonkeyPatch,
    prepare: Callable[[], Any],
    act: Callable[[], Any],
    check: Callable[[bool], Any],
    name: str,
) -> int:
    """Lets each operation of `act` fail in turn, in each way; returns how many there are.

    `check` is told whether it was a kill.
    """
    for fault in (errno.ENOSPC, errno.EIO, None):
        for at in range(1, 1000):
            prepare()
            with failing(monkeypatch, at, fault) as done:
                problem = outcome(act)
            if fault is None:
                assert problem is None or isinstance(problem, Killed)
            elif problem is not None:
                assert isinstance(problem, atomic.WriteError)
                assert name in str(problem), f"the error does not name the path: {problem}"
                assert os.strerror(fault) in str(problem)
            check(fault is None)
            if len(done) < at:
                assert at > 3, "nothing was written through the counted operations"
                break
        else:
            raise AssertionError("it never ends")
    return at - 1


def test_a_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it.json"
    states = {b"old" * 100, b"new" * 200}

    def check(killed: bool) -> None:
        assert path.read_bytes() in states

    count = every_fault(
        monkeypatch,
        lambda: atomic.write(path, b"old" * 100),
        lambda: atomic.write(path, b"new" * 200),
        check,
        "it.json",
    )
    assert count >= 6  # open, write, close, fsync (open, fsync, close), replace, folder
    atomic.write(path, b"new" * 200)
    assert [p.name for p in tmp_path.iterdir()] == ["it.json"], "what was written aside was left behind"


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a kill between two renames: then it is the old one, under the name .NAME.old."""
    path = tmp_path / "model"

    def writer(text: str) -> Callable[[Path], None]:
        def fill(aside: Path) -> None:
            for name in ("a", "b"):
                atomic.write(aside / name, text)

        return fill

    def prepare() -> None:
        for leftover in tmp_path.iterdir():
            shutil.rmtree(leftover)
        atomic.write_folder(path, writer("old"))

    def check(killed: bool) -> None:
        where = path if path.exists() else tmp_path / ".model.old"
        assert {(where / name).read_text() for name in ("a", "b")} in ({"old"}, {"new"})

    every_fault(monkeypatch, prepare, lambda: atomic.write_folder(path, writer("new")), check, "model")


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    atomic.write_folder(tmp_path / "model", lambda aside: atomic.write(aside / "a", "old"))

    def writer(aside: Path) -> None:
        atomic.write(aside / "a", "new")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        atomic.write_folder(tmp_path / "model", writer)
    assert (tmp_path / "model" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_line_that_failed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"

    def act() -> None:
        lines = atomic.LineWriter(path)
        try:
            for i in range(3):
                lines.append(f"line {i}")
            lines.sync()
        finally:
            with suppress(OSError):
                os.close(lines._file)

    def check(killed: bool) -> None:
        text = path.read_text() if path.exists() else ""
        *whole, rest = text.split("\n")
        assert whole == [f"line {i}" for i in range(len(whole))]
        assert not rest or killed, "only a kill leaves half a line"

    every_fault(monkeypatch, lambda: path.unlink(missing_ok=True), act, check, "lines")


def test_lines_go_on_where_they_counted(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = atomic.LineWriter(path)
    lines.append("one")
    counted = lines.length
    lines.append("two, which nobody saved")
    lines.close()
    again = atomic.LineWriter(path, counted)
    again.append("three")
    again.close()
    assert path.read_text() == "one\nthree\n"
    with pytest.raises(ValueError, match="lines are missing"):
        atomic.LineWriter(path, 1000)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep)

    def state(number: int) -> State:
        return State({"number": number}, {"x": torch.full((5,), float(number))})

    def prepare() -> None:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        checkpoints.save("a", state(1))

    def check(killed: bool) -> None:
        found = checkpoints.newest(pytest.fail)
        assert found is not None
        assert found.data["number"] in (1, 2)
        assert torch.equal(found.tensors["x"], state(found.data["number"]).tensors["x"])

    every_fault(monkeypatch, prepare, lambda: checkpoints.save("b", state(2)), check, "checkpoints")


@pytest.mark.slow
def test_every_file_of_a_run_names_itself_when_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in turn: config, metrics, rows, comparisons, a model's folder, a checkpoint."""
    numbers = iter(range(10**6))

    def act() -> None:
        folder = tmp_path / f"run-{next(numbers)}"
        with Run(folder, {"seed": 0}) as run:
            run.log("ppo", 0, {"score/mean": 1.0})
            run.write_rows("samples.jsonl", [{"a": 1}])
            write_comparisons(run.path("preferences.jsonl"), [Comparison("p", ("a", "b"))])
            run.write_folder("policy", lambda aside: atomic.write(aside / "weights", b"1"))
            run.finish_stage("policy", outputs=["policy"])
            run.checkpoint("ppo", 1, {})

    def check(killed: bool) -> None:
        folder = max(tmp_path.glob("run-*"), key=lambda p: int(p.name[4:]), default=None)
        if folder is None:
            return
        if (folder / "preferences.jsonl").exists():
            assert read_comparisons(folder / "preferences.jsonl") == [Comparison("p", ("a", "b"))]
        found = Checkpoints(folder / "checkpoints").newest(pytest.fail)
        if found is not None:
            assert (folder / "metrics.jsonl").stat().st_size >= found.part("run").count("metrics_bytes")
            assert (folder / "policy" / "weights").read_bytes() == b"1"
        shutil.rmtree(folder)

    monkeypatch.setattr("agents.runs.trackers.tensorboard_writer", lambda *_: None)
    monkeypatch.setattr("agents.runs.folder.revision", lambda: "")
    assert every_fault(monkeypatch, lambda: None, act, check, "run-") > 60


@pytest.mark.parametrize("seed", range(30))
def test_a_changed_checkpoint_is_refused_in_one_line(tmp_path: Path, seed: int) -> None:
    """Truncated, bits flipped, files gone or swapped, another format, a pickle in its place."""
    import pickle
    import random

    rng = random.Random(seed)
    folder = tmp_path / "000001-ppo-3"
    write_state(folder, State({"a": 1.5, "b": [1, 2]}, {"x": torch.arange(64.0), "y": torch.arange(9)}))
    victim = folder / ("state.json", "tensors.safetensors")[seed % 2]
    raw = victim.read_bytes()
    marker = tmp_path / "executed"
    match seed // 2 % 5:
        case 0:
            raw = raw[: rng.randrange(len(raw))]
        case 1:
            bit = rng.randrange(len(raw) * 8)
            raw = bytes(byte ^ (1 << bit % 8) if i == bit // 8 else byte for i, byte in enumerate(raw))
        case 2:
            raw = pickle.dumps(_Bomb(marker))
        case 3:
            at = rng.randrange(len(raw))
            raw = raw[:at] + rng.randbytes(16) + raw[at:]
        case 4:
            raw = b""
    victim.write_bytes(raw)
    said: list[str] = []
    with pytest.raises(Damaged, match="all checkpoints") as refusal:
        Checkpoints(tmp_path).newest(said.append)
    assert len(said) == 1
    assert victim.name in said[0]
    assert "\n" not in said[0] + str(refusal.value)
    assert not marker.exists()


class _Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_the_one_before_a_damaged_checkpoint_is_used(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, number=3)
    for number in range(5):
        checkpoints.save(f"ppo-{number}", State({"number": number}))
    assert [path.name for path in checkpoints.all()] == ["000003-ppo-2", "000004-ppo-3", "000005-ppo-4"]
    (checkpoints.all()[-1] / "state.json").write_text("{}")
    said: list[str] = []
    found = checkpoints.newest(said.append)
    assert found is not None
    assert found.data["number"] == 3
    assert len(said) == 1
    assert "000005-ppo-4" in said[0]


def test_a_checkpoint_of_another_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agents.runs.checkpoint.FORMAT", 99)
    write_state(tmp_path / "1", State())
    monkeypatch.undo()
    with pytest.raises(Damaged, match="its format is 99, and this version reads 1"):
        read_state(tmp_path / "1")


def test_numbers_keep_their_bits(tmp_path: Path) -> None:
    tensors = {
        "f": torch.randn(7),
        "b": torch.randn(3).bfloat16(),
        "i": torch.tensor(2**53 + 1),
        "u": torch.tensor([True]),
    }
    data = {"x": 0.1 + 0.2, "y": [1e-308, 3], "z": {"nan": float("nan")}}
    write_state(tmp_path / "1", State(data, tensors))
    back = read_state(tmp_path / "1")
    assert back.data == {"x": 0.1 + 0.2, "y": [1e-308, 3], "z": {"nan": None}}
    assert all(
        torch.equal(back.tensors[name], t) and back.tensors[name].dtype == t.dtype for name, t in tensors.items()
    )


def test_tensors_that_share_their_memory_are_kept(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    write_state(tmp_path / "one", State({}, {"whole": whole, "part": whole[:2], "again": whole}))
    found = read_state(tmp_path / "one").tensors
    assert torch.equal(found["part"], whole[:2])
    assert torch.equal(found["again"], whole)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x": torch.zeros(4)}, "should be"),
        ({"x": torch.zeros(3, dtype=torch.float64)}, "should be"),
        ({"y": torch.zeros(3)}, "only one of them has 'x'"),
        ({"x": torch.zeros(3), "y": torch.zeros(3)}, "only one of them has 'y'"),
    ],
)
def test_what_does_not_fit_changes_nothing(tensors: dict[str, torch.Tensor], said: str) -> None:
    target = torch.ones(3)
    with pytest.raises(ValueError, match=said):
        State({}, tensors).copy_to({"x": target})
    assert torch.equal(target, torch.ones(3))
