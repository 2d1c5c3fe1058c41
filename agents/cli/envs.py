"""`lmgym envs`: the registered environments."""

from collections.abc import Sequence
from dataclasses import dataclass

from agents.cli.options import parse
from lmgym.io import printable
from lmgym.registry import TASK_SPECS


@dataclass(frozen=True)
class Envs:
    """List the registered environments."""


def run(argv: Sequence[str]) -> int:
    """Prints one line for each environment."""
    parse("envs", Envs, argv)
    width = max(map(len, TASK_SPECS))
    for entry in TASK_SPECS.values():
        print(printable(f"{entry.id:{width}}  {entry.summary} (model {entry.model})"))
    return 0
