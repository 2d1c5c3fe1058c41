"""Which of two texts is better: comparisons, where they come from, and how they are kept."""

from lmgym.preferences.annotators import SimulatedAnnotator, collect_comparisons
from lmgym.preferences.comparisons import Comparison, read_comparisons, write_comparisons

__all__ = ["Comparison", "SimulatedAnnotator", "collect_comparisons", "read_comparisons", "write_comparisons"]
