"""Comparisons of texts: simulated annotators, labels by people, and functions to read and write them."""

from lmgym.preferences.agreement import (
    Figure,
    cohen_kappa,
    error_rate,
    krippendorff_alpha,
    side_bias,
    wilson,
    wilson_interval,
)
from lmgym.preferences.annotators import SimulatedAnnotator, collect_comparisons
from lmgym.preferences.asking import Asker, Outcome, Rules
from lmgym.preferences.comparisons import Comparison, write_comparisons
from lmgym.preferences.database import StoreError
from lmgym.preferences.items import LONGEST, MOST_TEXTS, Item, Label, Showing
from lmgym.preferences.label_card import label_card
from lmgym.preferences.label_files import Format, Ties, comparisons_of, export_labels, import_labels, read_items
from lmgym.preferences.label_stats import LabellerStats, LabelStats, label_stats
from lmgym.preferences.labellers import SimulatedLabeller
from lmgym.preferences.queries import Strategy
from lmgym.preferences.rows import leave_out, read_comparisons
from lmgym.preferences.store import LabelStore

__all__ = [
    "LONGEST",
    "MOST_TEXTS",
    "Asker",
    "Comparison",
    "Figure",
    "Format",
    "Item",
    "Label",
    "LabelStats",
    "LabelStore",
    "LabellerStats",
    "Outcome",
    "Rules",
    "Showing",
    "SimulatedAnnotator",
    "SimulatedLabeller",
    "StoreError",
    "Strategy",
    "Ties",
    "cohen_kappa",
    "collect_comparisons",
    "comparisons_of",
    "error_rate",
    "export_labels",
    "import_labels",
    "krippendorff_alpha",
    "label_card",
    "label_stats",
    "leave_out",
    "read_comparisons",
    "read_items",
    "side_bias",
    "wilson",
    "wilson_interval",
    "write_comparisons",
]
