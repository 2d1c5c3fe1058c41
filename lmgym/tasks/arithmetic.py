"""Add a digit to a number below 90: the answer to "add: 37 + 5 =" is " 42"."""

import numpy as np

from lmgym.tasks.base import Prompt
from lmgym.tasks.rule import RuleTask


class Arithmetic(RuleTask):
    """Add a number of one or two digits and one digit: 900 prompts. A wrong demonstration is off by 1, 2 or 10."""

    name = "arithmetic"

    def parts(self, text: str) -> list[str]:
        # Digits, not words: a sum with one of two digits right gets half of the partial credit.
        return list(text.strip())

    def draw(self, rng: np.random.Generator) -> Prompt:
        a, b = int(rng.integers(90)), int(rng.integers(10))
        return Prompt(f"add: {a} + {b} =", {"answer": str(a + b)})

    def mistake(self, answer: str, rng: np.random.Generator) -> str:
        offset = int(rng.choice((-10, -2, -1, 1, 2, 10)))
        total = int(answer) + offset
        return str(total if total >= 0 else int(answer) - offset)
