"""`lmgym loop`: people compare texts, a reward model learns from them, a policy learns from it, and again.

Each step is a command of its own with a folder of its own, so that it can be looked at, repeated and resumed by itself.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from agents.cli.commands import run_command
from agents.cli.label import Simulated
from agents.cli.options import check_numbers, parse
from lmgym.io import atomic
from lmgym.preferences import LabelStore, comparisons_of, label_stats


@dataclass(frozen=True)
class Loop:
    """Rounds of labels, reward model and RL. The same command continues a loop that was interrupted."""

    task: tyro.conf.Positional[str] = "Sentiment"
    """A registered environment, such as "Sentiment" or "lmgym/Sort-v0"."""
    out: str = "runs/loop"
    """Folder of the loop."""
    rounds: int = 3
    """Rounds."""
    labels: int = 150
    """Labels in each round."""
    texts: int = 4
    """Texts in a question: 2, or up to 4 to rank; a ranking of four holds six pairs."""
    candidates: int = 2
    """Questions that are sampled for each that is asked, so that there is a choice."""
    seed: int = 0
    """Seed of all random numbers."""
    sft: str = ""
    """Further options of `lmgym sft`, as one text."""
    label: str = ""
    """Further options of `lmgym label`, as one text, such as "--ask disagreement --retrain-every 50 --labellers 5"."""
    reward: str = ""
    """Further options of `lmgym reward`, as one text."""
    train: str = ""
    """Further options of `lmgym train`, as one text, such as "--algorithm rloo --rloo.updates 20"."""
    simulate: Annotated[Simulated, tyro.conf.arg(name="simulate")] = field(default_factory=Simulated)
    """Simulated labellers instead of people."""

    def __post_init__(self) -> None:
        for name in ("rounds", "labels", "candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is too small: give 1 or more")


def _with_joined_texts(argv: Sequence[str]) -> list[str]:
    """The command line with `--train "--ppo.updates 2"` as one argument: a value with a dash would be an option."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] in ("--sft", "--label", "--reward", "--train"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def run(argv: Sequence[str]) -> int:
    """Runs the rounds, and prints what came of each."""
    wanted = parse("loop", Loop, _with_joined_texts(argv))
    check_numbers(wanted)
    out = Path(wanted.out)
    atomic.make_folder(out, parents=True)
    same = ["--seed", str(wanted.seed)]
    base, db = out / "sft", out / "labels.db"
    status = _step(base / "sft", ["sft", wanted.task, "--out", str(base), *same, *shlex.split(wanted.sft)])
    before = json.loads((out / "loop.json").read_bytes()) if (out / "loop.json").is_file() else []
    found: list[dict[str, Any]] = []
    for number in range(1, wanted.rounds + 1):
        folder = out / f"round-{number}"
        if len(before) >= number and (folder / "rl" / "policy" / "README.md").is_file():
            found.append(before[number - 1])
            continue
        writer = base if number == 1 else out / f"round-{number - 1}" / "rl"
        status = status or _label(wanted, db, writer, number)
        reward = ["reward", "--labels", str(db), "--model", str(base / "sft"), "--out", str(folder / "reward"), *same]
        status = status or _step(folder / "reward" / "reward_model", [*reward, *shlex.split(wanted.reward)])
        rl = ["train", wanted.task, "--model", str(base / "sft"), "--sft.examples", "0", "--out", str(folder / "rl")]
        rl += ["--reward", str(folder / "reward" / "reward_model"), *same, *shlex.split(wanted.train)]
        status = status or _step(folder / "rl" / "policy", rl)
        if status:
            return status
        found.append(_outcome(folder, db, number))
        atomic.write(out / "loop.json", json.dumps(found, indent=1) + "\n")
    _show(found)
    return 0


def _step(product: Path, command: Sequence[str]) -> int:
    """Runs a command unless its product is there; a finished command writes the product's card last."""
    if (product / "README.md").is_file():
        return 0
    print(f"lmgym {shlex.join(command)}", flush=True)
    return run_command(command[0], command[1:])


def _label(wanted: Loop, db: Path, writer: Path, number: int) -> int:
    """Gathers the labels of a round, unless the file has them."""
    wanted_in_all = number * wanted.labels
    if db.is_file():
        with LabelStore(db) as store:
            if _counted(store) >= wanted_in_all:
                return 0
    options = {
        "db": db, "count": wanted.labels * wanted.candidates, "texts": wanted.texts, "until": wanted_in_all,
        "seed": wanted.seed + number, "port": 0 if wanted.simulate.labellers else 8765,
    }  # fmt: skip
    simulated = {f"simulate.{name.replace('_', '-')}": value for name, value in vars(wanted.simulate).items()}
    given = [f"--{name}={value}" for name, value in (options | simulated).items()]
    command = ["label", str(writer), "--ask", "newest", *given, *shlex.split(wanted.label)]
    print(f"lmgym {shlex.join(command)}", flush=True)
    status = run_command("label", command[1:])
    with LabelStore(db) as store:
        if not comparisons_of(store, "train"):
            raise ValueError(f"{db}: no labels to train on: answer some questions, then give the same command again")
    return status


def _counted(store: LabelStore) -> int:
    """The labels of questions, without skips and repeats."""
    asked = {item.id for item in store.items("ask")}
    return sum(label.item in asked and label.answer != "skip" and not label.repeat for label in store.labels())


def _outcome(folder: Path, db: Path, number: int) -> dict[str, Any]:
    """What came of a round."""
    evaluation = json.loads((folder / "rl" / "evaluation.json").read_bytes())
    rows = [json.loads(line) for line in (folder / "reward" / "metrics.jsonl").read_text().splitlines()]
    accuracy = next((row["accuracy/test"] for row in reversed(rows) if "accuracy/test" in row), None)
    with LabelStore(db) as store:
        labels, alpha = _counted(store), label_stats(store).alpha
    return {
        "round": number,
        "labels": labels,
        "alpha": alpha.value if alpha.count else None,
        "accuracy": accuracy,
        "before": {name: figure["mean"] for name, figure in evaluation["before"].items()},
        "after": {name: figure["mean"] for name, figure in evaluation["after"].items()},
        "best_gold": evaluation["best_gold"],
    }


def _show(found: Sequence[dict[str, Any]]) -> None:
    table = Table("round", "labels", "reward model's accuracy", "gold before", "gold after", "KL, nats per sequence")
    for row in found:
        cells = (
            row["accuracy"],
            row["before"].get("gold"),
            row["after"].get("gold"),
            row["after"].get("kl_nats_per_sequence"),
        )
        table.add_row(str(row["round"]), str(row["labels"]), *("" if x is None else f"{x:.3f}" for x in cells))
    Console().print(table)
