"""`lmgym algorithms`: the algorithms that `lmgym train --algorithm NAME` takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from agents.cli.options import parse
from agents.pipeline import load_algorithm as catalog
from lmgym.io import printable


@dataclass(frozen=True)
class Algorithms:
    """List the algorithms, for `lmgym train --algorithm NAME`."""


def run(argv: Sequence[str]) -> int:
    """Prints one line for each algorithm."""
    parse("algorithms", Algorithms, argv)
    known = catalog.available()
    width = max(map(len, known))
    for name, module in known.items():
        print(printable(f"{name:{width}}  {catalog.summary(module)}"))
    return 0
