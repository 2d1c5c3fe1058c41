"""What a file of labels says about its labellers and about the reward models trained on it."""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lmgym.preferences.agreement import (
    NOTHING,
    Figure,
    alpha_with_interval,
    cohen_kappa,
    error_rate,
    side_bias,
    wilson,
)
from lmgym.preferences.items import Item, Label
from lmgym.preferences.store import LabelStore

LONG_BREAK = 300.0
"""Seconds without an answer after which the pace counts anew."""
COUNTED = {"a": 0.0, "b": 1.0, "tie": 2.0, "neither": 3.0}
"""Answers to pairs as numbers, for α."""


@dataclass(frozen=True)
class LabellerStats:
    """One labeller.

    Attributes:
        name: a pseudonym.
        labels: answers that count, without repeats.
        seconds: median time per answer; NaN if unknown.
        left, consistency, gold, agreement: as in `LabelStats`; agreement is the share of equal answers with others.
    """

    name: str
    labels: int
    seconds: float
    left: Figure
    consistency: Figure
    gold: Figure
    agreement: Figure


@dataclass(frozen=True)
class LabelStats:
    """All labellers together.

    Attributes:
        answers: how often each answer was given, without repeats.
        left: share of "left" among "left" and "right"; 1/2 is expected, because sides are drawn evenly.
        bias: side bias b; see `agreement.side_bias`.
        consistency: share of equal answers to the same question with the sides reversed.
        gold: share of right answers to hidden questions with a known answer.
        error: error rate ε from the same; see `agreement.error_rate`.
        alpha: Krippendorff's α of the answers to pairs (a, b, tie, neither are four nominal values).
        kappa: mean of Cohen's κ over pairs of labellers, weighted by the items they share; NaN without any.
        agreement: share of equal answers of two labellers to the same item.
        model: accuracy of the newest reward model on held-out labels of random questions.
        model_labels: the number of labels that it was trained on.
        labellers: one by one.
        per_minute: answers a minute, without breaks.
    """

    answers: Mapping[str, int]
    left: Figure
    bias: Figure
    consistency: Figure
    gold: Figure
    error: Figure
    alpha: Figure
    kappa: float
    agreement: Figure
    model: Figure
    model_labels: int
    labellers: tuple[LabellerStats, ...]
    per_minute: float

    @property
    def side_alarm(self) -> bool:
        """Whether the interval of the share of "left" does not hold one half."""
        return bool(self.left.count) and not self.left.low <= 0.5 <= self.left.high

    @property
    def ceiling(self) -> float:
        """The accuracy that a perfect reward model would have against these labels; NaN without two labellers.

        If both are right with the same probability q, they agree with the probability q² + (1 − q)².
        """
        if not self.agreement.count:
            return math.nan
        return (1 + math.sqrt(max(0.0, 2 * self.agreement.value - 1))) / 2


def label_stats(store: LabelStore) -> LabelStats:
    """The figures of a file of labels."""
    labels, items = store.labels(), {item.id: item for item in store.items()}
    trainings = store.rows("SELECT * FROM trainings ORDER BY id DESC LIMIT 1")
    return stats_of(labels, items, dict(trainings[0]) if trainings else None)


def stats_of(
    labels: Sequence[Label], items: Mapping[int, Item], training: Mapping[str, int] | None = None
) -> LabelStats:
    """The figures of labels.

    Args:
        labels: those that count.
        items: by id.
        training: of the newest reward model, with "right", "pairs" and "labels"; None without any.
    """
    first = [label for label in labels if not label.repeat and items[label.item].purpose != "calibration"]
    asked = [label for label in first if items[label.item].purpose == "ask"]
    by_name = defaultdict(list)
    for label in labels:
        if items[label.item].purpose != "calibration":
            by_name[label.labeller].append(label)
    equal = _equal_answers(asked)
    return LabelStats(
        answers=dict(Counter(label.answer for label in first)),
        left=_left(labels),
        bias=side_bias(*_sides(labels)),
        consistency=_consistency(labels),
        gold=_gold(first, items),
        error=error_rate(_known(first, items)),
        alpha=alpha_with_interval(ratings(asked)) if equal else NOTHING,
        kappa=_mean_kappa(asked),
        agreement=wilson(sum(equal_ones for _, _, equal_ones in equal), len(equal)),
        model=wilson(training["right"], training["pairs"]) if training is not None else NOTHING,
        model_labels=training["labels"] if training is not None else 0,
        labellers=tuple(_one(name, own, items, equal) for name, own in sorted(by_name.items())),
        per_minute=pace(labels),
    )


def ratings(labels: Sequence[Label]) -> np.ndarray:
    """[labellers, items] the answers to pairs as numbers, by `COUNTED`; NaN where a labeller gave no answer."""
    counted = [label for label in labels if label.answer in COUNTED]
    names = {name: row for row, name in enumerate(sorted({label.labeller for label in counted}))}
    columns = {item: column for column, item in enumerate(sorted({label.item for label in counted}))}
    found = np.full((len(names), len(columns)), np.nan)
    for label in counted:
        found[names[label.labeller], columns[label.item]] = COUNTED[label.answer]
    return found


def pace(labels: Sequence[Label]) -> float:
    """Answers a minute of one labeller, over the gaps between answers that are no breaks; the mean over labellers."""
    times: dict[str, list[float]] = defaultdict(list)
    for label in labels:
        times[label.labeller].append(label.answered_at)
    paces = []
    for own in times.values():
        gaps = [b - a for a, b in itertools.pairwise(own) if 0 < b - a < LONG_BREAK]
        if gaps:
            paces.append(60 * len(gaps) / sum(gaps))
    return sum(paces) / len(paces) if paces else math.nan


def _one(
    name: str, own: Sequence[Label], items: Mapping[int, Item], equal: Sequence[tuple[str, str, bool]]
) -> LabellerStats:
    times = sorted(label.client_ms / 1000 for label in own if label.client_ms is not None)
    mine = [same for first, second, same in equal if name in (first, second)]
    once = [label for label in own if not label.repeat]
    return LabellerStats(
        name=name,
        labels=len(once),
        seconds=float(np.median(times)) if times else math.nan,
        left=_left(own),
        consistency=_consistency(own),
        gold=_gold(once, items),
        agreement=wilson(sum(mine), len(mine)),
    )


def _sides(labels: Sequence[Label]) -> tuple[int, int]:
    """The number of answers "left", and of those "left" or "right"."""
    decided = [label for label in labels if label.answer in ("a", "b") and len(label.side) == 2]
    return sum(label.ranking[0] == label.side[0] for label in decided), len(decided)


def _left(labels: Sequence[Label]) -> Figure:
    return wilson(*_sides(labels))


def _consistency(labels: Sequence[Label]) -> Figure:
    first = {(label.labeller, label.item): label for label in labels if not label.repeat}
    again = [(first.get((label.labeller, label.item)), label) for label in labels if label.repeat]
    same = [a.answer == b.answer and a.ranking == b.ranking for a, b in again if a is not None]
    return wilson(sum(same), len(same))


def _gold(labels: Sequence[Label], items: Mapping[int, Item]) -> Figure:
    right = [label.ranking[0] == items[label.item].best for label in _with_known_answer(labels, items)]
    return wilson(sum(right), len(right))


def _known(labels: Sequence[Label], items: Mapping[int, Item]) -> list[tuple[bool, bool]]:
    return [
        (items[label.item].best == label.side[0], label.ranking[0] == label.side[0])
        for label in _with_known_answer(labels, items)
        if len(label.side) == 2
    ]


def _with_known_answer(labels: Sequence[Label], items: Mapping[int, Item]) -> list[Label]:
    return [label for label in labels if items[label.item].purpose == "gold" and label.ranking]


def _equal_answers(labels: Sequence[Label]) -> list[tuple[str, str, bool]]:
    """For each pair of labellers of the same item: their names, and whether they gave the same answer."""
    by_item: dict[int, list[Label]] = defaultdict(list)
    for label in labels:
        if label.answer != "skip" and label.side:
            by_item[label.item].append(label)
    return [
        (a.labeller, b.labeller, a.answer == b.answer and a.ranking == b.ranking)
        for found in by_item.values()
        for a, b in itertools.combinations(found, 2)
    ]


def _mean_kappa(labels: Sequence[Label]) -> float:
    table = ratings(labels)
    found, weights = [], []
    for first, second in itertools.combinations(table, 2):
        both = np.isfinite(first) & np.isfinite(second)
        kappa = cohen_kappa(first[both].tolist(), second[both].tolist())
        if math.isfinite(kappa):
            found.append(kappa)
            weights.append(int(both.sum()))
    return float(np.average(found, weights=weights)) if found else math.nan
