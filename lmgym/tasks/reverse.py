"""Turn a row of letters round: "reverse: d b a c =" wants " c a b d"."""

import numpy as np

from lmgym.tasks.base import Prompt
from lmgym.tasks.rule import RuleTask, draw_letters, exchange_two


class Reverse(RuleTask):
    """Reverse three or four different letters. A wrong demonstration has two neighbours exchanged."""

    name = "reverse"

    def draw(self, rng: np.random.Generator) -> Prompt:
        letters = draw_letters(rng)
        return Prompt(f"reverse: {' '.join(letters)} =", {"answer": " ".join(reversed(letters))})

    def mistake(self, answer: str, rng: np.random.Generator) -> str:
        return exchange_two(answer, rng)
