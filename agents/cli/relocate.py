"""`lmgym relocate`: after the folder of a run was moved, its adapters name their base again."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from agents.cli.options import parse
from agents.runs import read_config
from lmgym.io import printable
from lmgym.models import load, name_base


@dataclass(frozen=True)
class Relocate:
    """Let the adapters of a run that was moved name their base again, for plain peft."""

    run: tyro.conf.Positional[str]
    """Folder of a run, where it is now."""


def run(argv: Sequence[str]) -> int:
    """Rewrites the path of the base in each saved adapter; refuses all if one belongs to other weights."""
    folder = Path(parse("relocate", Relocate, argv).run)
    read_config(folder)
    base = folder / "sft"
    adapters = sorted(
        path.parent for name in ("policy", "policy_best") for path in (folder / name).rglob("adapter_config.json")
    )
    if not base.is_dir() or not adapters:
        raise ValueError(
            f"the run in {str(folder)!r} has no saved adapter with a base: it needs the folders sft and policy"
        )
    lm = load(str(base))
    for adapter in adapters:
        lm.adapters.load(adapter, "checked")
        lm.adapters.drop("checked")
    for adapter in adapters:
        name_base(adapter, str(base.absolute()), lm.model)
        print(printable(f"{adapter}: base {base.absolute()}"))
    return 0
