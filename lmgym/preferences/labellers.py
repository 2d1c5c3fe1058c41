"""Simulated people at the labelling page, with the faults that its figures are to recover."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORST = 0.5
"""The error rate of somebody who guesses."""


@dataclass(frozen=True)
class SimulatedLabeller:
    """Chooses the text with the highest score, with errors.

    With the probability |b| the answer is the side of the bias, whatever the texts are. Otherwise it is the better text
    or, with the probability ε of an error, the other one. ε grows with fatigue, up to a half.

    Attributes:
        error_rate: ε of the first answer.
        side_bias: b, positive to the left and negative to the right.
        fatigue: what is added to ε in a hundred answers.
        other_taste: prefers the lowest score, as a minority might.
        tie_within: answers "tie" if two scores differ by at most this; None: never.
    """

    error_rate: float = 0.168
    side_bias: float = 0.0
    fatigue: float = 0.0
    other_taste: bool = False
    tie_within: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate <= WORST or not -1 < self.side_bias < 1 or self.fatigue < 0:
            raise ValueError(
                f"error_rate={self.error_rate} must lie in [0, {WORST}], side_bias={self.side_bias} in (-1, 1), and "
                f"fatigue={self.fatigue} must be 0 or more"
            )

    def choose(self, scores: Sequence[float], rng: np.random.Generator, answered: int = 0) -> dict[str, object]:
        """An answer as the page sends it: {"choice": "left"}, or {"choice": "ranking", "ranking": [2, 0, 1]}.

        Args:
            scores: of the texts, from left to right.
            rng: the source of randomness.
            answered: how many answers the labeller has given before.
        """
        sign = -1.0 if self.other_taste else 1.0
        values = [sign * score for score in scores]
        if self.tie_within is not None and max(values) - min(values) <= self.tie_within:
            return {"choice": "tie"}
        rate = min(WORST, self.error_rate + self.fatigue * answered / 100)
        if len(values) > 2:
            return {"choice": "ranking", "ranking": self._rank(values, rate, rng)}
        if rng.random() < abs(self.side_bias):
            return {"choice": "left" if self.side_bias > 0 else "right"}
        right = values[1] > values[0] if values[0] != values[1] else bool(rng.random() < 0.5)
        wrong = bool(rng.random() < rate)
        return {"choice": "right" if right != wrong else "left"}

    def _rank(self, values: Sequence[float], rate: float, rng: np.random.Generator) -> list[int]:
        """Best first, by insertion; each comparison is wrong with probability ε."""
        order: list[int] = []
        for index, value in enumerate(values):
            place = len(order)
            while place > 0 and (value > values[order[place - 1]]) != (rng.random() < rate):
                place -= 1
            order.insert(place, index)
        return order
