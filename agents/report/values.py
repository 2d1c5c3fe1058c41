"""Numbers as a run's JSON files hold them: null, not finite, or beyond the range of a float."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]

ROUNDING = 1e-5
"""A KL in nats, or what it costs in score, below this is rounding error of the log-probabilities."""


def is_numeric(value: object) -> bool:
    """Whether a value is null or a number; a bool is not a number."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def as_float(value: object) -> float | None:
    """The value as a finite float; None if it is not one."""
    try:
        converted = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer beyond the range of a float
        return None
    return converted if math.isfinite(converted) else None


def finite_values(rows: Sequence[Row], name: str) -> list[float]:
    """The finite values of a metric, in the order of the rows."""
    return [value for row in rows if (value := as_float(row.get(name))) is not None]


def nearly_equal(pairs: Iterable[tuple[object, object]]) -> bool:
    """Whether the two numbers of every pair are equal up to float32 rounding; False if no pair holds a number."""
    table = np.array([(as_float(a), as_float(b)) for a, b in pairs], dtype=float).reshape(-1, 2)
    table = table[np.isfinite(table).any(axis=1)]
    return bool(len(table)) and bool((np.abs(np.diff(table)) <= 1e-5 * np.abs(table).max()).all())
