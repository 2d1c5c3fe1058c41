"""Simulated annotators, and the collection of comparisons."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmgym.preferences.comparisons import Comparison
from lmgym.tasks.base import Completion, Prompt, Task


@dataclass(frozen=True)
class SimulatedAnnotator:
    """An annotator that follows a Bradley-Terry model of the gold score, with a constant rate of random errors.

    P(a before b) = error_rate + (1 − 2 error_rate) σ(scale · (gold(a) − gold(b))).

    Without errors it is the model of Bradley and Terry 1952 (https://doi.org/10.2307/2334029). Two annotators who are
    each right 83.2 % of the time agree 72 % of the time, which is the agreement that Stiennon et al. 2020 measured
    (https://arxiv.org/abs/2009.01325). This gives the default error rate.

    Attributes:
        error_rate: the probability that a label is flipped, independently of the texts.
        scale: the slope of the preference, per unit of gold score; a larger scale gives fewer random choices.
    """

    error_rate: float = 0.168
    scale: float = 20.0

    def __post_init__(self) -> None:
        if not 0 <= self.error_rate < 0.5 or not self.scale > 0:
            raise ValueError(
                f"error_rate={self.error_rate} must lie in [0, 0.5), and scale={self.scale} must be positive"
            )

    def prefers(self, first: float, second: float) -> float:
        """The probability that a text of gold score `first` is preferred to one of gold score `second`."""
        margin = min(max(self.scale * (first - second), -500.0), 500.0)
        return self.error_rate + (1 - 2 * self.error_rate) / (1 + math.exp(-margin))

    def rank(self, golds: Sequence[float], rng: np.random.Generator) -> list[int]:
        """The indices of K completions, best first, from pairwise comparisons (insertion sort)."""
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
    """Collects comparisons: completions of the same prompt, ranked by an annotator.

    Duplicate and unfinished completions are left out (Ziegler et al. 2019, https://arxiv.org/abs/1909.08593), as are
    prompts with fewer than two remaining texts.

    Args:
        task: computes the gold scores.
        prompts: N prompts.
        groups: the completions of each prompt.
        annotator: ranks the completions.
        rng: the source of randomness for the annotator.
        skip_ties: leave out completions whose gold score equals that of an earlier one, for noise-free test labels.
        include_unfinished: also compare unfinished completions, for tasks that score them like other texts.
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
            found.append(Comparison(prompt.text, tuple(texts[i] for i in order), prompt.messages))
    return found
