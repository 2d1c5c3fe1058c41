"""Speed of lmgym and other libraries, in turns, on the same models and the same work; outputs are checked first.

    python -m benchmarks.speed                       # all, about half an hour
    python -m benchmarks.speed --quick               # rollout and PPO against generate and TRL, two minutes
    python -m benchmarks.speed --plan large          # a Llama of 135 M parameters, a few minutes
    python -m benchmarks.speed --device cuda         # larger models, on a GPU
    python -m benchmarks.speed --only ppo/T grpo     # some suites or measurements
    python -m benchmarks.speed --draw                # only write tables and plots

Every contender is a process of its own with pinned threads. They take turns, round by round, so that a machine that
becomes slower affects all of them: quote ratios of medians within a measurement. Each measurement appends a line to
benchmarks/results.jsonl; tables and plots go to docs/performance.md.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from agents.runs.machine import hardware, revision
from benchmarks import environments, oracle, tables
from benchmarks.shapes import make
from benchmarks.suites import PLANS, Contender, Measurement
from benchmarks.worker import Job, Worker

RESULTS = environments.ROOT / "benchmarks" / "results.jsonl"


def start(measurement: Measurement, contender: Contender, device: str, threads: int) -> tuple[Worker, Job]:
    """Starts a contender's process."""
    folder = make(measurement.shape, environments.HOME / "models")
    work = {"dtype": contender.dtype, "device": device, "options": dict(contender.options)} | dict(measurement.work)
    job = Job(str(folder), **work)
    command = [environments.python(contender.environment), "-m", *contender.module.split()]
    log = environments.HOME / "logs" / f"{measurement.name}/{contender.name}.log".replace(" ", "_")
    return Worker(command, job, log, environments.variables(threads), environments.ROOT), job


def measure(measurement: Measurement, device: str, threads: int, rounds: int | None) -> dict[str, Any]:
    """Checks every contender, then times them in turns.

    Raises:
        AssertionError: a contender's outputs are wrong.
        RuntimeError: a contender failed.
    """
    workers: dict[str, Worker] = {}
    found: dict[str, Any] = {}
    try:
        for contender in measurement.contenders:  # one after another: loading slows the others
            worker, job = start(measurement, contender, device, threads)
            workers[contender.name] = worker
            row = found[contender.name] = {"dtype": contender.dtype, "versions": worker.ready(), "turns": []}
            worker.run()
            row["check"] = verify(contender, job, worker)
        for turn in range(rounds or measurement.rounds):
            for contender in measurement.contenders:
                if turn < contender.rounds:
                    found[contender.name]["turns"].append(workers[contender.name].run())
        for name, worker in workers.items():
            found[name]["peak_mb"] = round(worker.stop(), 1)
    finally:
        for worker in workers.values():
            worker.kill()
    return {name: summary(row) for name, row in found.items()}


def verify(contender: Contender, job: Job, worker: Worker) -> dict[str, float]:
    """Compares the outputs of the first turn with a plain forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "outputs.safetensors"
        worker.save(path)
        outputs = load_file(path)
    return oracle.check(contender.name, job, outputs, adapter=not contender.own_adapter) if outputs else {}


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """Medians and spread of a contender's turns."""
    turns = row.pop("turns")
    seconds = [turn["seconds"] for turn in turns]
    phases = {name: statistics.median(turn["phases"][name] for turn in turns) for name in turns[0]["phases"]}
    return row | {
        "seconds": round(statistics.median(seconds), 5),
        "least": round(min(seconds), 5),
        "most": round(max(seconds), 5),
        "n": len(seconds),
        "phases": {name: round(value, 5) for name, value in phases.items()},
    }


def selected(plan: tuple[Measurement, ...], only: list[str]) -> list[Measurement]:
    """The measurements of a plan that the user chose: by suite ("ppo"), by name ("ppo/T"), or all."""
    chosen = [m for m in plan if not only or {m.suite, m.name, m.suite.split()[0]} & set(only)]
    if not chosen:
        raise SystemExit(f"nothing to do: choose from {', '.join(m.name for m in plan)}")
    return chosen


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="lmgym against its peers.")
    parser.add_argument("--quick", action="store_true", help="the main ratios, in two minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", default=[], help="suites (ppo) or measurements (ppo/T)")
    parser.add_argument("--plan", choices=tuple(PLANS), help="a whole plan by name, such as try")
    parser.add_argument("--rounds", type=int, help="timed turns of each contender")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each contender")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="the file to which each measurement appends a line"
    )
    parser.add_argument("--draw", action="store_true", help="measure nothing, write tables and plots")
    return parser.parse_args()


def main() -> None:
    """Measures, and writes the results."""
    options = arguments()
    plan = PLANS[options.plan or ("cuda" if options.device == "cuda" else "quick" if options.quick else "full")]
    about = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware().partition(", torch threads")[0],
        "threads": options.threads,
        "device": options.device,
        "revision": revision(),
        "command": shlex.join(["python", "-m", "benchmarks.speed", *sys.argv[1:]]),
    }
    for measurement in [] if options.draw else selected(plan, options.only):
        contenders = measure(measurement, options.device, options.threads, options.rounds)
        line = about | {"suite": measurement.suite, "shape": measurement.shape, "work": dict(measurement.work)}
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"contenders": contenders}) + "\n")
        tables.show(measurement.name, contenders)
    if options.results == RESULTS and not options.quick and options.plan in (None, "large"):
        tables.write(tables.read(RESULTS))


if __name__ == "__main__":
    main()
