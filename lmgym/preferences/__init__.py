"""Comparisons of texts: simulated annotators, and functions to read and write JSONL files."""

from lmgym.preferences.annotators import SimulatedAnnotator, collect_comparisons
from lmgym.preferences.comparisons import Comparison, read_comparisons, write_comparisons

__all__ = ["Comparison", "SimulatedAnnotator", "collect_comparisons", "read_comparisons", "write_comparisons"]
