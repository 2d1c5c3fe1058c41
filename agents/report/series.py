"""Metrics as tables of numbers, thinned and smoothed for a chart."""

import math
from collections.abc import Sequence

import numpy as np

from agents.report.values import Row, as_float

POINTS = 400
"""A chart is about 350 pixels wide: more points only add bytes."""

SMOOTH_FROM = 40
"""Rows from which a chart has a running mean."""

REACH = 4
"""Rows that the running mean takes in on either side, at least; a fortieth of the rows in long runs."""


def metric_table(rows: Sequence[Row], *names: str) -> np.ndarray:
    """[n, 1 + names]: the step and the metrics of the rows that hold them all; NaN where a value is not finite.

    If the steps do not increase, because the stage ran more than once, the rows are counted instead.
    """
    values = [
        [math.nan if (value := as_float(row[name])) is None else value for name in ("step", *names)]
        for row in rows
        if all(name in row for name in names)
    ]
    table = np.array(values, dtype=float).reshape(len(values), 1 + len(names))
    if (np.diff(table[:, 0]) <= 0).any():
        table[:, 0] = np.arange(len(table))
    return table


def mean_of_runs(runs: Sequence[np.ndarray]) -> np.ndarray:
    """[n, 2], the update and the mean over runs, at the updates that all of them have; a gap in one is a gap in it.

    Args:
        runs: [n, 2] each, update and value, without repeated updates.
    """
    updates = [set(run[:, 0]) for run in runs]
    shared = sorted(set.intersection(*updates))
    values = [run[np.isin(run[:, 0], shared), 1] for run in runs]
    return np.column_stack([shared, np.mean(values, axis=0)]) if shared else np.zeros((0, 2))


def thin(table: np.ndarray) -> np.ndarray:
    """At most `POINTS` rows: means of neighbouring rows."""
    size = math.ceil(len(table) / POINTS)
    if size <= 1:
        return table
    return np.array([table[start : start + size].mean(axis=0) for start in range(0, len(table), size)])


def running_mean(table: np.ndarray) -> np.ndarray:
    """[n, 2], the step and the mean of the finite values around it.

    The window is centred, because a trailing mean would lag. Towards the start it narrows to one value, so that the
    mean starts exactly at the first finite value. At the end it is cut off.

    Args:
        table: [n, 2], the step and one metric.
    """
    known = np.isfinite(table[:, 1]).nonzero()[0]
    if not len(known):
        return table
    table = table[known[0] : known[-1] + 1]
    count = len(table)
    reach = min(max(REACH, count // 40), (count - 1) // 2)
    finite = np.isfinite(table[:, 1])
    values = np.where(finite, table[:, 1], 0.0)
    window = np.ones(2 * reach + 1)
    sums, counts = (np.convolve(column, window)[reach : reach + count] for column in (values, finite.astype(float)))
    for at in range(reach):
        sums[at], counts[at] = values[: 2 * at + 1].sum(), finite[: 2 * at + 1].sum()
    means = np.divide(sums, counts, out=np.full(count, np.nan), where=counts > 0)
    return np.column_stack([table[:, 0], means])
