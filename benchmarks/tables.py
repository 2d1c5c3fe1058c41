"""The tables and plots of docs/performance.md, from benchmarks/results.jsonl."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def show(name: str, contenders: Mapping[str, Any]) -> None:
    """Prints one measurement."""
    table = Table("contender", "median s", "least", "most", "n", "ratio", "peak MB", "check", title=name)
    base = next(iter(contenders.values()))["seconds"]
    for contender, row in contenders.items():
        figures = (f"{row[key]:.3f}" for key in ("seconds", "least", "most"))
        check = f"{max(row['check'].values()):.1e}" if row["check"] else ""
        ratio = f"{base / row['seconds']:.2f}"
        table.add_row(contender, *figures, str(row["n"]), ratio, f"{row['peak_mb']:.0f}", check)
    Console().print(table)


def read(path): ...
def write(lines): ...
