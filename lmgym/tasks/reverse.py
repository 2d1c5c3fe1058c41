"""Reverse a list of letters: the answer to "reverse: d b a c =" is " c a b d"."""

import numpy as np

from lmgym.tasks.base import Prompt
from lmgym.tasks.rule import RuleTask, draw_letters, exchange_two


class Reverse(RuleTask):
    """Reverse three or four different letters. In a wrong demonstration, two adjacent letters are swapped."""

    name = "reverse"

    def draw(self, rng: np.random.Generator) -> Prompt:
        letters = draw_letters(rng)
        return Prompt(f"reverse: {' '.join(letters)} =", {"answer": " ".join(reversed(letters))})

    def mistake(self, answer: str, rng: np.random.Generator) -> str:
        return exchange_two(answer, rng)
