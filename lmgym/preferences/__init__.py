"""Which of two texts is better: comparisons, where they come from, and how they are kept."""

from lmgym.preferences.annotators import SimulatedAnnotator, ask
from lmgym.preferences.comparisons import Comparison, read_comparisons, write_comparisons

__all__ = ["Comparison", "SimulatedAnnotator", "ask", "read_comparisons", "write_comparisons"]
