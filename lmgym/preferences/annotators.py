"""Simulated annotators, and the pairs to ask them about."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmgym.preferences.comparisons import Comparison
from lmgym.tasks.base import Completion, Prompt, Task


@dataclass(frozen=True)
class SimulatedAnnotator:
    """Prefers by a Bradley-Terry model of the gold score, and errs at a constant rate.

    P(a before b) = error_rate + (1 − 2 error_rate) σ(scale · (gold(a) − gold(b))).

    An annotator who is right 83.2 % of the time agrees with another such one 72 % of the time, which is what Stiennon
    et al. (2020) measured of theirs; hence the default.

    Attributes:
        error_rate: how often the label is wrong whatever the texts.
        scale: how sharply small differences are seen, per unit of gold score.
    """

    error_rate: float = 0.168
    scale: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate < 0.5 or not self.scale > 0:
            raise ValueError(
                f"error_rate={self.error_rate} must lie in [0, 0.5), and scale={self.scale} must be positive"
            )

    def prefers(self, first: float, second: float) -> float:
        """The probability of preferring a text of gold score `first` to one of `second`."""
        margin = min(max(self.scale * (first - second), -500.0), 500.0)
        return self.error_rate + (1 - 2 * self.error_rate) / (1 + math.exp(-margin))

    def rank(self, golds: Sequence[float], rng: np.random.Generator) -> list[int]:
        """Indices, the best first: K completions are put in order by comparing them one with another (insertion)."""
        order: list[int] = []
        for index, gold in enumerate(golds):
            place = len(order)
            while place > 0 and rng.random() < self.prefers(gold, golds[order[place - 1]]):
                place -= 1
            order.insert(place, index)
        return order


def collect_comparisons(
    task: Task,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    annotator: SimulatedAnnotator,
    rng: np.random.Generator,
    skip_ties: bool = False,
    include_unfinished: bool = False,
) -> list[Comparison]:
    """Has an annotator compare completions of the same prompt.

    Repetitions are not shown, nor are unfinished completions (Ziegler et al. 2019); what then has fewer than two texts
    is left out.

    Args:
        task: gives the gold score.
        prompts: N prompts.
        groups: the completions of each prompt.
        annotator: who compares.
        rng: draws the annotator's labels.
        include_unfinished: show unfinished completions, for tasks that score them like any other text.
        skip_ties: leave out completions whose gold score equals that of one before, for noise-free test labels.
    """
    found = []
    for prompt, group in zip(prompts, groups, strict=True):
        shown: dict[str, float] = {}
        fit = [completion for completion in group if include_unfinished or completion.finish_reason == "stop"]
        golds = task.gold([prompt] * len(fit), fit)
        for completion, gold in zip(fit, golds, strict=True):
            if completion.text not in shown and not (skip_ties and gold in shown.values()):
                shown[completion.text] = gold
        if len(shown) >= 2:
            texts = list(shown)
            order = annotator.rank(list(shown.values()), rng)
            found.append(Comparison(prompt.text, tuple(texts[i] for i in order)))
    return found
