"""Small tasks on the letters a to d, on which the defaults of the algorithms are tuned (docs/tuning.md).

The suite `text-v1` has other tasks, so that its results say how the defaults do on tasks that they were not tuned on.
"""

from functools import partial
from itertools import pairwise

import numpy as np

from lmgym.tasks.base import Completion, Prompt
from lmgym.tasks.letters import Letters, Noisy
from lmgym.tasks.probe import LETTERS


class Pairs(Letters):
    """Every two adjacent letters pay or cost something, according to a fixed random table; four letters at most.

    The score is the sum over the text, divided by 3 and moved so that the empty text scores 0.4.

    Args:
        factor: multiplies the scores.
    """

    name = "pairs"

    def __init__(self, factor: float = 1.0):
        self.factor = self.best = factor
        self.table = np.random.default_rng(0).uniform(-0.6, 0.6, (len(LETTERS), len(LETTERS)))

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        ids = [LETTERS.index(letter) for letter in text[:4] if letter in LETTERS]
        return self.factor * (0.4 + sum(float(self.table[pair]) for pair in pairwise(ids)) / 3)


LargePairs = partial(Pairs, factor=10.0)
"""The same with ten times the score."""


class NoisyPairs(Noisy, Pairs):
    """The same with noise."""

    def __init__(self, sigma: float = 0.5):
        Noisy.__init__(self, sigma)
        Pairs.__init__(self)


class Successors(Letters):
    """Continue the alphabet from the prompt's letter, for three letters: "cda" after "b". Each right one pays 1/3."""

    name = "successors"

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        start = LETTERS.find(prompt.text.strip())
        wanted = [LETTERS[(start + i) % len(LETTERS)] for i in (1, 2, 3)]
        return sum(a == b for a, b in zip(wanted, text, strict=False)) / 3 if len(text) <= 3 else 0.0


class LastLetter(Letters):
    """Only the last letter of a text that ends counts: an "a" pays as much as the text is long, in fifths."""

    name = "last_letter"

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return 0.2 * len(text) if completion.finish_reason == "stop" and text.endswith("a") else 0.0


class Palindrome(Letters):
    """Read the same in both directions, with two letters or more; the share of letters that do, times length / 5."""

    name = "palindrome"

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        if len(text) < 2 or len(set(text)) == 1:
            return 0.0
        return sum(a == b for a, b in zip(text, reversed(text), strict=True)) / 5


class Twice(Letters):
    """Write "dd" somewhere: a score that most texts do not have."""

    name = "twice"

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return float("dd" in text)


class Balance(Letters):
    """Write a long text with given shares of the letters: 1 less half the sum of the deviations from `wanted`.

    Args:
        length: of the text, in letters.
    """

    name = "balance"
    wanted = (0.4, 0.3, 0.2, 0.1)

    def __init__(self, length: int = 16):
        self.length = length

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        shares = [text.count(letter) / self.length for letter in LETTERS]
        return 1.0 - 0.5 * sum(abs(share - wanted) for share, wanted in zip(shares, self.wanted, strict=True))
