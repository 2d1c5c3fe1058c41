"""Comparisons of texts: simulated annotators, and functions to read and write them."""

from lmgym.preferences.annotators import SimulatedAnnotator, collect_comparisons
from lmgym.preferences.comparisons import Comparison, write_comparisons
from lmgym.preferences.rows import leave_out, read_comparisons

__all__ = [
    "Comparison",
    "SimulatedAnnotator",
    "collect_comparisons",
    "leave_out",
    "read_comparisons",
    "write_comparisons",
]
