"""`make gpu` on machines without a GPU: its steps, its record, and what it says."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import Step
from benchmarks.suites import PLANS


def python(name: str, code: str, limit: float = 60.0) -> Step:
    return Step(name, ("-c", code), limit)


def test_a_failure_is_recorded_and_the_next_step_runs(tmp_path: Path) -> None:
    said, record = list[str](), tmp_path / "gpu.json"
    wanted = [
        python("good", "print('a figure')"),
        python("bad", "raise SystemExit('no memory')"),
        python("stuck", "import time; print('began', flush=True); time.sleep(60)", limit=6.0),
        python("last", "print(2)"),
    ]
    began = time.perf_counter()
    outcomes = gpu.run_all(wanted, record, say=said.append)
    assert time.perf_counter() - began < 40
    assert [outcome.ended for outcome in outcomes] == ["passed", "failed (code 1)", "too slow", "passed"]
    found = json.loads(record.read_text())
    assert [step["name"] for step in found["steps"]] == ["good", "bad", "stuck", "last"]
    assert "a figure" in found["steps"][0]["output"]
    assert "no memory" in found["steps"][1]["output"]
    assert "began" in found["steps"][2]["output"]
    assert found["hardware"]
    assert any("no memory" in line for line in said)
    assert "2 of 4 steps passed" in said[-1]


def test_steps_without_time_are_recorded_too(tmp_path: Path) -> None:
    outcomes = gpu.run_all([python("one", "1"), python("two", "2")], tmp_path / "gpu.json", budget=4.0, say=str)
    assert [outcome.ended for outcome in outcomes] == ["no time", "no time"]


def test_the_steps_are_the_tests_and_every_measurement() -> None:
    for on_cpu, plan in ((False, "gpu"), (True, "gpu-try")):
        steps = gpu.steps(on_cpu, Path("results.jsonl"))
        assert [steps[0].name, steps[1].name] == ["tests", "models"]
        assert {m.name for m in PLANS[plan]} <= {step.name for step in steps}
        assert "gpu" in steps[0].arguments
        assert all(("cpu" in step.arguments) is on_cpu for step in steps if "--plan" in step.arguments)
    assert {m.shape for m in PLANS["gpu"]} == {"L", "Qwen"}
    assert {c.dtype for m in PLANS["gpu"] for c in m.contenders} == {"bfloat16"}
    assert gpu.BUDGET <= 480


def test_without_a_gpu_it_says_that_nothing_was_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--record", str(tmp_path / "gpu.json")])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu.main()
    assert capsys.readouterr().out.startswith("SKIPPED, nothing was run: torch sees no CUDA device")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert "torch is 2.9.1+cu128, and must be 2.11 or newer" in gpu.unusable()
