"""The base class of tasks with one right answer: scoring, partial credit and demonstrations."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from lmgym.tasks.base import Completion, Prompt, Split, Task, sample_in_split

LETTERS = "abcdefgh"


class RuleTask(Task):
    """A task whose prompts have one right answer, `prompt.data["answer"]`.

    A completion scores 1 if it is the answer and nothing else; white space around and between parts is ignored.
    Otherwise, if it has as many parts as the answer, it scores half the share of parts that are right at their
    position; else 0.

    Args:
        demonstration_accuracy: the probability that a demonstration is right. At 1, supervised fine-tuning leaves
            little to learn by reinforcement.
    """

    best = 1.0

    def __init__(self, demonstration_accuracy: float = 0.5):
        self.demonstration_accuracy = demonstration_accuracy

    @abstractmethod
    def draw(self, rng: np.random.Generator) -> Prompt:
        """Draws a prompt of either split; its data has the field "answer"."""

    @abstractmethod
    def mistake(self, answer: str, rng: np.random.Generator) -> str:
        """Writes a plausible wrong answer."""

    def parts(self, text: str) -> list[str]:
        """Splits an answer into parts, which are compared position by position; by default into words."""
        return text.split()

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return sample_in_split(lambda: self.draw(rng), split)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [self._score(p.data["answer"], c.text) for p, c in zip(prompts, completions, strict=True)]

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        answer = prompt.data["answer"]
        right = rng.random() < self.demonstration_accuracy
        return " " + (answer if right else self.mistake(answer, rng))

    def _score(self, answer: str, text: str) -> float:
        wanted, given = self.parts(answer), self.parts(text)
        if given == wanted:
            return 1.0
        if len(given) != len(wanted):
            return 0.0
        return 0.5 * sum(a == b for a, b in zip(given, wanted, strict=True)) / len(wanted)


def draw_letters(rng: np.random.Generator) -> list[str]:
    """Three or four different letters in random order, out of 2016 possible lists."""
    return [LETTERS[i] for i in rng.permutation(len(LETTERS))[: rng.integers(3, 5)]]


def exchange_two(answer: str, rng: np.random.Generator) -> str:
    """A list of letters with two adjacent letters swapped."""
    letters = answer.split()
    i = int(rng.integers(len(letters) - 1))
    letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return " ".join(letters)
