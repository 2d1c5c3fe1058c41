"""`lmgym label stats|export|import|withdraw|rate DB`: what comes of a file of labels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from agents.cli.options import parse
from lmgym.io import atomic, printable
from lmgym.preferences import (
    Format,
    LabelStats,
    LabelStore,
    Ties,
    export_labels,
    import_labels,
    label_card,
    label_stats,
)


@dataclass(frozen=True)
class Stats:
    """Show what a file of labels says about its labellers and reward models, with 95 % intervals."""

    db: tyro.conf.Positional[str]
    """File of labels."""


@dataclass(frozen=True)
class Export:
    """Write labels to a file for training or another tool, and a data-set card beside it."""

    db: tyro.conf.Positional[str]
    """File of labels."""
    file: tyro.conf.Positional[str]
    """File to write."""
    form: Annotated[Format, tyro.conf.arg(name="format")] = "pairs"
    """"pairs": prompt, chosen and rejected, or ranking, one row per label. "conversations": the same as messages, as
    TRL reads them. "argilla": records for Argilla. "texts": what people wrote, for --prompts of `lmgym sft`. "whole":
    everything, to be imported again."""
    ties: Ties = "drop"
    """Leave ties out ("drop"), or write them with the label ½ ("half")."""
    split: Literal["all", "train", "test"] = "all"
    """Of "pairs" and "conversations": all labels, those to train on, or those that are held out. `lmgym reward
    --preferences TRAIN --test-preferences TEST` then trains the same model as `--labels DB`."""


@dataclass(frozen=True)
class Import:
    """Read labels that `lmgym label export` wrote; what the file of labels has already is not added again."""

    db: tyro.conf.Positional[str]
    """File of labels; it is made if it does not exist."""
    file: tyro.conf.Positional[str]
    """File to read."""
    form: Annotated[Format, tyro.conf.arg(name="format")] = "whole"
    """Its format, as for export."""
    labeller: str = "imported"
    """Pseudonym for labels of a file that names none."""


@dataclass(frozen=True)
class Withdraw:
    """Delete all answers of a labeller; that somebody withdrew, and when, is kept."""

    db: tyro.conf.Positional[str]
    """File of labels."""
    name: tyro.conf.Positional[str]
    """Pseudonym of the labeller."""


@dataclass(frozen=True)
class Rate:
    """Train an ensemble of reward models on the labels, measure it on held-out ones, and score the open questions."""

    db: tyro.conf.Positional[str]
    """File of labels."""
    model: str = "tiny"
    """Language model to start from."""
    members: int = 3
    """Reward models in the ensemble."""
    pad_token: str | None = None
    """Replaces the padding token of the tokenizer."""
    chat_template: str | None = None
    """Jinja file with a chat template, instead of the tokenizer's own."""
    template_options: str = ""
    """Values of the chat template's variables, as JSON."""
    seed: int = 0
    """Seed of all random numbers."""
    device: str = "auto"
    """"cpu", "cuda", or "auto"."""
    threads: int = 0
    """CPU threads of torch, as in `lmgym train`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights."""
    epochs: int = field(default=2)
    """Passes over the labels."""


def stats(argv: Sequence[str]) -> int:
    """Prints the figures."""
    wanted = parse("label stats", Stats, argv)
    with LabelStore(wanted.db) as store:
        found = label_stats(store)
    console = Console()
    console.print(_figures(found))
    if found.side_alarm:
        console.print(Text("The share of “left” differs from one half: somebody answers by the side."))
    if found.labellers:
        console.print(_labellers(found))
    return 0


def _figures(found: LabelStats) -> Table:
    table = Table("measure", "value [95 % interval]", "what it is")
    answers = ", ".join(f"{name} {count}" for name, count in sorted(found.answers.items()))
    rows = (
        ("answers", answers or "none yet", "without repeats"),
        ("left", str(found.left), "share of “left”; one half is expected"),
        ("side bias b", str(found.bias), "share of answers given by the side alone"),
        ("consistency", str(found.consistency), "same answer to the same question, sides reversed"),
        ("gold", str(found.gold), "right answers to hidden questions with a known answer"),
        ("error rate ε", str(found.error), "wrong answers among those not given by the side"),
        ("agreement", str(found.agreement), "same answer of two labellers"),
        ("Krippendorff's α", str(found.alpha), "agreement beyond chance, nominal"),
        (
            "Cohen's κ",
            "no data yet" if math.isnan(found.kappa) else f"{found.kappa:.2f}",
            "mean over pairs of labellers",
        ),
        ("reward model", str(found.model), f"accuracy on held-out labels, after {found.model_labels} labels"),
        ("its ceiling", "no data yet" if math.isnan(found.ceiling) else f"{found.ceiling:.2f}", "from the agreement"),
        ("pace", "no data yet" if math.isnan(found.per_minute) else f"{found.per_minute:.1f}", "answers a minute"),
    )
    for row in rows:
        table.add_row(*row)
    return table


def _labellers(found: LabelStats) -> Table:
    table = Table(Column("labeller", no_wrap=True), "answers", "seconds", "left", "consistency", "gold", "agreement")
    for one in found.labellers:
        seconds = "" if math.isnan(one.seconds) else f"{one.seconds:.1f}"
        figures = (str(f).partition(" (")[0] for f in (one.left, one.consistency, one.gold, one.agreement))
        table.add_row(Text(printable(one.name)), str(one.labels), seconds, *figures)
    return table


def export(argv: Sequence[str]) -> int:
    """Writes the file and its card."""
    wanted = parse("label export", Export, argv)
    card = Path(wanted.file).with_suffix(".card.md")
    with LabelStore(wanted.db) as store:
        rows = export_labels(store, wanted.file, wanted.form, wanted.ties, wanted.split)
        atomic.write(card, label_card(store, Path(wanted.file).name, wanted.form, rows))
    print(f"{rows} rows: {wanted.file}; their data-set card: {card}")
    return 0


def read_in(argv: Sequence[str]) -> int:
    """Reads the file."""
    wanted = parse("label import", Import, argv)
    with LabelStore(wanted.db, create=True) as store:
        rows = import_labels(store, wanted.file, wanted.form, wanted.labeller)
        print(f"{rows} rows read; {wanted.db} has {len(store.labels())} labels")
    return 0


def withdraw(argv: Sequence[str]) -> int:
    """Deletes the answers."""
    wanted = parse("label withdraw", Withdraw, argv)
    with LabelStore(wanted.db) as store:
        events = store.withdraw(wanted.name)
    print(f"{events} answers of {printable(wanted.name)} are deleted; delete what you exported before, too")
    return 0


def rate(argv: Sequence[str]) -> int:
    """Trains and scores."""
    wanted = parse("label rate", Rate, argv)
    from agents.cli.names import model_named
    from agents.labelling.rating import rate_open_items
    from agents.pipeline import RewardOptions

    with LabelStore(wanted.db) as store:
        lm = model_named(wanted.model, wanted)
        rated = rate_open_items(store, lm, RewardOptions(epochs=wanted.epochs), wanted.seed, wanted.members)
    print(
        f"{rated.labels} labels: right on {rated.right} of {rated.pairs} held-out pairs; "
        f"{rated.scored} questions scored"
    )
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "stats": stats,
    "export": export,
    "import": read_in,
    "withdraw": withdraw,
    "rate": rate,
}
