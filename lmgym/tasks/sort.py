"""Put letters into alphabetical order: the answer to "sort: d b a c =" is " a b c d"."""

import numpy as np

from lmgym.tasks.base import Prompt
from lmgym.tasks.rule import RuleTask, draw_letters, exchange_two


class Sort(RuleTask):
    """Sort three or four different letters. In a wrong demonstration, two adjacent letters are swapped."""

    name = "sort"

    def draw(self, rng: np.random.Generator) -> Prompt:
        letters = draw_letters(rng)
        return Prompt(f"sort: {' '.join(letters)} =", {"answer": " ".join(sorted(letters))})

    def mistake(self, answer: str, rng: np.random.Generator) -> str:
        return exchange_two(answer, rng)
