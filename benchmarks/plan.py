"""How well `lmgym plan` predicts: twelve settings of the built-in model, each planned and then trained.

    python -m benchmarks.plan                     # all that are not done yet; a setting takes about a minute
    python -m benchmarks.plan --only 1 2 3
    python -m benchmarks.plan --table             # run nothing: write the table into docs/planning.md

Compared are the processor's seconds, which other processes on the machine change little; the seconds by the clock,
which they change much; and the peak memory above that of Python with its libraries. Rows go to benchmarks/plan.jsonl.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from agents.cli import main
from agents.runs.machine import hardware, revision
from benchmarks.learning import write_between

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_name("plan.jsonl")
PAGE = ROOT / "docs" / "planning.md"
FOLDER = ROOT / ".bench" / "plan"
WANTED = 0.15
"""Relative error that a prediction may have."""
MEASURES = {"processor_seconds": "processor, s", "seconds": "clock, s", "peak_mb": "memory, MB"}

SETTINGS = (
    "Sort --algorithm ppo --ppo.updates 20",
    "Sort --algorithm ppo --ppo.rows 128 --ppo.updates 16 --ppo.lora-rank 16",
    "Sort --algorithm grpo --grpo.updates 60",
    "Sort --algorithm grpo --grpo.rows 128 --grpo.updates 60 --grpo.lora-rank 2",
    "Sort --algorithm rloo --rloo.rows 32 --rloo.updates 80",
    "Sort --algorithm a2c --a2c.updates 80 --a2c.lora-rank 32",
    "Sentiment --reward task --algorithm ppo --ppo.updates 6 --sft.examples 320",
    "Sentiment --reward task --algorithm grpo --grpo.updates 16 --max-new-tokens 16",
    "Sentiment --algorithm rloo --rloo.updates 6 --preferences.prompts 64 --sft.examples 320 --test-prompts 128",
    "Sentiment --reward task --algorithm a2c --a2c.rows 32 --a2c.updates 32 --max-new-tokens 24",
    "Sentiment --reward task --algorithm grpo --grpo.updates 20 --grpo.lora-rank 32 --sft.examples 320",
    "Sort --algorithm rloo --rloo.rows 128 --rloo.updates 40 --sft.examples 3000",
)
"""The command lines after `lmgym train`."""


def measure(number: int, code: str) -> dict[str, Any]:
    """Plans a setting, trains it, and returns both. After an interruption, a plan that was made is used."""
    setting, load = SETTINGS[number - 1], os.getloadavg()[0]
    plan, run = FOLDER / f"{number}.json", FOLDER / f"{number}"
    line = [*setting.split(), "--threads=1", f"--plan={plan}", f"--out={run}"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run, ignore_errors=True)
    if not plan.exists() and main(["plan", *line, "--no-alternatives"]):
        raise RuntimeError(f"{setting} cannot be planned")
    subprocess.run([sys.executable, "-m", "agents.cli", "train", *line], cwd=ROOT, stdout=sys.stderr, check=True)
    found = json.loads((run / "plan.json").read_text(encoding="utf-8"))
    disk = sum(file.stat().st_size for file in run.rglob("*") if file.is_file()) / 1e6
    shutil.rmtree(run)
    plan.unlink()
    actual = found["actual"].values()
    measured = {name: sum(stage[name] for stage in actual) for name in ("processor_seconds", "seconds")}
    measured["peak_mb"] = max(stage["peak_mb"] for stage in actual)
    return {
        "setting": setting, "planned": {name: found["total"][name] for name in MEASURES}, "actual": measured,
        "stages": {
            name: {m: [found["stages"][name][m]["value"], stage[m]] for m in MEASURES}
            for name, stage in found["actual"].items()
        },
        "corrected_seconds": found["corrected_seconds"], "trial_seconds": found["trial_seconds"],
        "disk_mb": [found["total"]["disk_mb"], disk], "load": [load, os.getloadavg()[0]], "hardware": hardware(1),
        "torch": torch.__version__, "revision": code, "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python -m benchmarks.plan",
    }  # fmt: skip


def read() -> dict[str, dict[str, Any]]:
    """The rows, by setting; of one that was measured again, the last."""
    lines = RESULTS.read_text(encoding="utf-8").splitlines() if RESULTS.is_file() else []
    rows = {row["setting"]: row for row in map(json.loads, lines)}
    return {setting: rows[setting] for setting in SETTINGS if setting in rows}


def table(rows: list[dict[str, Any]]) -> str:
    """Planned and actual of each setting, and how well they agree."""
    lines = ["| setting | " + " | ".join(f"{name}: planned | actual | " for name in MEASURES.values()) + " |"]
    lines.append("|---|" + "---:|---:|---:|" * len(MEASURES))
    errors: dict[str, list[float]] = {name: [] for name in MEASURES}
    for row in rows:
        cells = []
        for name in MEASURES:
            planned, actual = row["planned"][name]["value"], row["actual"][name]
            errors[name].append(planned / actual - 1)
            digits = 0 if name == "peak_mb" else 1
            cells.append(f"{planned:.{digits}f} | {actual:.{digits}f} | {100 * errors[name][-1]:+.0f} %")
        lines.append(f"| `{row['setting']}` | " + " | ".join(cells).replace("-", "−") + " |")
    lines += ["", f"{len(rows)} of {len(SETTINGS)} settings are measured:", ""]
    for name, title in MEASURES.items():
        off = np.abs(errors[name])
        pairs = [(row["planned"][name]["value"], row["actual"][name]) for row in rows]
        found: Any = spearmanr(pairs)
        rank = f"; rank correlation {found.statistic:.3f}" if len(rows) > 2 else ""
        within = sum(r["planned"][name]["low"] <= r["actual"][name] <= r["planned"][name]["high"] for r in rows)
        lines.append(
            f"- {title.partition(',')[0]}: {int((off <= WANTED).sum())} of {len(rows)} within ±{WANTED:.0%}, median "
            f"error {np.median(off):.1%}, largest {off.max():.1%}; inside the plan's band {within}{rank}"
        )
    machines = "; ".join(sorted({f"{row['hardware']}, torch {row['torch']}" for row in rows}))
    loads = [load for row in rows for load in row["load"]]
    codes = ", ".join(sorted({row["revision"] for row in rows}))
    load = f"load of the machine {min(loads):.1f} to {max(loads):.1f}"
    lines += ["", f"`python -m benchmarks.plan`, seed 0; {machines}; {load}; revision {codes}."]
    return "\n".join(lines)


def measure_all() -> None:
    """Measures the settings that are not done, and prints the table."""
    parser = argparse.ArgumentParser(description="Planned against actual time and memory.")
    parser.add_argument("--only", nargs="+", type=int, default=range(1, len(SETTINGS) + 1), help="numbers, from 1")
    parser.add_argument("--again", action="store_true", help="also those that are done")
    parser.add_argument("--table", action="store_true", help="run nothing; write the table into docs/planning.md")
    options = parser.parse_args()
    code = revision()  # before the results change the tree
    for number in () if options.table else options.only:
        setting = SETTINGS[number - 1]
        if setting in read() and not options.again:
            continue
        row = measure(number, code)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(
            setting,
            {n: (round(row["planned"][n]["value"], 1), round(row["actual"][n], 1)) for n in MEASURES},
            flush=True,
        )
    if rows := [*read().values()]:
        print(table(rows))
        if options.table:
            write_between(PAGE, "table", table(rows))


if __name__ == "__main__":
    measure_all()
