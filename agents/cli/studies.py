"""`lmgym studies`: the studies that `lmgym study NAME` runs."""

from collections.abc import Sequence
from dataclasses import dataclass

from agents.cli.options import parse
from agents.studies import STUDIES


@dataclass(frozen=True)
class Studies:
    """List the studies, for `lmgym study NAME`."""


def run(argv: Sequence[str]) -> int:
    """Prints one line for each study."""
    parse("studies", Studies, argv)
    width = max(map(len, STUDIES))
    for name, paper in STUDIES.items():
        print(f"{name:{width}}  {paper}")
    return 0
