"""A grid of settings and seeds, on one machine or in shards on several. Stop it at any time, and start it again.

python examples/slurm/grid.py --jobs 2                  # all of it here, two runs at a time
python examples/slurm/grid.py --shard 1/2 --out one     # half of it; the other machine runs 2/2
python examples/slurm/grid.py --merge one two           # the results of both
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from agents.cli import main as lmgym
from agents.experiments import Cell, Shard, Workers, read_results, run_cells

RUNS = Path("runs/grid")
SMALL = ["--sft.examples", "64", "--ppo.updates", "2", "--ppo.rows", "16", "--test-prompts", "32"]
CELLS = [
    Cell("rates", "Sort", f"lr {rate:g}", seed, {"--ppo.lr": f"{rate:g}"}, {"options": SMALL})
    for rate in (1e-3, 4e-3)
    for seed in range(2)
]


def run(cell: Cell) -> dict[str, Any]:
    """Runs `lmgym train` with the settings of a cell. A run that was interrupted is in its folder, and continues."""
    out = RUNS / cell.key
    if not (out / "evaluation.json").exists():
        settings = [word for pair in cell.config.items() for word in pair]
        command = ["train", cell.task, *cell.setting["options"], *settings, "--seed", str(cell.seed), "--out", str(out)]
        if lmgym(command) != 0:
            raise RuntimeError(f"`lmgym {' '.join(command)}` failed")
    after = json.loads((out / "evaluation.json").read_bytes())["after"]
    return {name: figure["mean"] for name, figure in after.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a shard, or shows the results of some folders; returns the number of cells that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--shard", default="1/1", help="which part: 2/4 is the second of four")
    parser.add_argument("--out", default=str(RUNS), help="folder of the results")
    parser.add_argument("--merge", nargs="+", metavar="FOLDER", help="show the results of these folders")
    options = parser.parse_args(arguments)
    if options.merge:
        rows = read_results(options.merge)
        table = Table("setting", "seed", "gold", "KL")
        for row in sorted(rows, key=lambda row: (row["agent"], row["index"])):
            found = row["result"] or {}
            table.add_row(row["agent"], str(row["index"]), *(f"{found.get(n, float('nan')):.3f}" for n in SHOWN))
        Console().print(table)
        print(f"{len(rows)} of {len(CELLS)} cells")
    else:
        shard = Shard.parse(options.shard)
        rows = run_cells(CELLS, "grid:run", options.out, Workers(options.jobs), shard=shard, console=Console())
    return sum(row["status"] != "ok" for row in rows)


SHOWN = ("gold", "kl_nats_per_sequence")

if __name__ == "__main__":
    sys.exit(main())
