"""`make gpu`: the tests marked `gpu`, then the CUDA benchmark, within eight minutes on one GPU.

    python -m benchmarks.gpu             # on a machine with a GPU and torch 2.11 or newer
    python -m benchmarks.gpu --try-cpu   # the same steps on a CPU with tiny models, to test this script

Every step is a process of its own with a time limit. A step that fails, or that there is no time for, is recorded and
the next one begins. The record is benchmarks/gpu.json: the machine, and for each step its command, how it ended, its
seconds and the end of its output. The measurements themselves are lines of benchmarks/results.jsonl, as always.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from agents.runs.machine import hardware, revision, versions
from benchmarks import environments
from benchmarks.suites import PLANS

RECORD = environments.ROOT / "benchmarks" / "gpu.json"
BUDGET = 480.0
"""Seconds for everything."""
LEAST_TORCH = (2, 11)
FOLDER = 'environments.HOME / "models"'
SHOWN = 4000
"""Letters of a step's output that are kept."""


@dataclass(frozen=True)
class Step:
    """What is run, and for how long at most.

    Attributes:
        name: in the record.
        arguments: of the Python interpreter.
        limit: seconds.
    """

    name: str
    arguments: tuple[str, ...]
    limit: float


@dataclass(frozen=True)
class Outcome:
    """How a step ended.

    Attributes:
        name: of the step.
        command: what was run.
        ended: "passed", "failed (code N)", "too slow" or "no time".
        seconds: how long it took.
        output: the end of what it printed.
    """

    name: str
    command: str
    ended: str
    seconds: float
    output: str


def steps(on_cpu: bool, results: Path) -> list[Step]:
    """The tests, then each measurement, the most important first."""
    plan, device = ("gpu-try", "cpu") if on_cpu else ("gpu", "cuda")
    # Without a GPU all of these tests are skipped, and pytest passes.
    tests = Step("tests", ("-m", "pytest", "-m", "gpu", "-q", "-n", "0", "tests"), 150.0)
    speed = ("-m", "benchmarks.speed", "--plan", plan, "--device", device, "--threads", "1", "--results", str(results))
    shapes = sorted({m.shape for m in PLANS[plan]})
    code = "; ".join(["from benchmarks.speed import environments, make", *(f"make({s!r}, {FOLDER})" for s in shapes)])
    models = Step("models", ("-c", code), 120.0)
    tables = [] if on_cpu else [Step("tables", ("-m", "benchmarks.speed", "--draw"), 60.0)]
    return [tests, models, *(Step(m.name, (*speed, "--only", m.name), 120.0) for m in PLANS[plan]), *tables]


def run(step: Step, seconds: float) -> Outcome:
    """Runs a step for at most its own limit and the seconds that are left."""
    command = [sys.executable, *step.arguments]
    shown, limit = shlex.join(["python", *step.arguments]), min(step.limit, seconds)
    if limit < 5:
        return Outcome(step.name, shown, "no time", 0.0, "")
    began = time.perf_counter()
    variables = os.environ | {"PYTHONPATH": str(environments.ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=variables,
        cwd=environments.ROOT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate(timeout=limit)
            ended = "passed" if process.returncode == 0 else f"failed (code {process.returncode})"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # its contenders too
            output, _ = process.communicate()
            ended = "too slow"
    return Outcome(step.name, shown, ended, round(time.perf_counter() - began, 1), output[-SHOWN:])


def run_all(
    wanted: Sequence[Step], record: Path, budget: float = BUDGET, say: Callable[[str], object] = print
) -> list[Outcome]:
    """Runs the steps, says how each ended, and writes the record after each."""
    began, outcomes = time.perf_counter(), list[Outcome]()
    about = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "cuda": torch.version.cuda,
        "versions": versions(),
        "revision": revision(),
    }
    for step in wanted:
        outcome = run(step, budget - (time.perf_counter() - began))
        outcomes.append(outcome)
        say(f"{outcome.ended:16} {outcome.seconds:6.1f} s  {outcome.name}")
        if outcome.ended.startswith("failed"):
            say("\n".join(f"    {line}" for line in outcome.output.splitlines()[-6:]))
        record.write_text(
            json.dumps(about | {"steps": [asdict(o) for o in outcomes]}, indent=1) + "\n", encoding="utf-8"
        )
    passed = sum(outcome.ended == "passed" for outcome in outcomes)
    say(f"{passed} of {len(outcomes)} steps passed in {time.perf_counter() - began:.0f} s; record: {record}")
    return outcomes


def unusable() -> str:
    """Why this machine cannot run the CUDA benchmark; "" if it can."""
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if found < LEAST_TORCH:
        return f"torch is {torch.__version__}, and must be {'.'.join(map(str, LEAST_TORCH))} or newer"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device (torch.cuda.is_available() is False)"
    return ""


def main() -> None:
    """Runs all steps. A failed step does not end it; its exit code is 0 unless the tests failed."""
    parser = argparse.ArgumentParser(description="The gpu tests and the CUDA benchmark, within eight minutes.")
    parser.add_argument("--try-cpu", action="store_true", help="the same steps on a CPU with tiny models")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--results", type=Path, default=environments.ROOT / "benchmarks" / "results.jsonl")
    options = parser.parse_args()
    reason = "" if options.try_cpu else unusable()
    if reason:
        print(f"SKIPPED, nothing was run: {reason}")
        return
    outcomes = run_all(steps(options.try_cpu, options.results), options.record)
    raise SystemExit(outcomes[0].ended != "passed")


if __name__ == "__main__":
    main()
