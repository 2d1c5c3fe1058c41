"""Two tasks that can be enumerated, so that their optimum is known exactly. The tests of the algorithms use them.

They are for the "probe" model, whose tokenizer knows only the letters a to d.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from types import MappingProxyType

import numpy as np

from lmgym.tasks.base import Completion, Prompt, Split, Task

LETTERS = "abcd"

BANDIT_SCORES: Mapping[str, float] = MappingProxyType({"a": 0.0, "b": 0.3, "c": 0.6, "d": 1.0})

TREE_BEST = "cdb"


def _tree_score(text: str) -> float:
    """Strings that begin with "a" have a higher mean score, but the best string begins with "c"."""
    if text == TREE_BEST:
        return 1.0
    spread = sum(factor * LETTERS.index(letter) for factor, letter in zip((7, 3, 5), text, strict=False)) % 10
    return round(0.1 * len(text) + 0.3 * text.startswith("a") + 0.02 * spread, 2)


TREE_SCORES: Mapping[str, float] = MappingProxyType(
    {text: _tree_score(text) for n in (1, 2, 3) for text in map("".join, product(LETTERS, repeat=n))}
)


class Probe(Task):
    """A task of the probe model: four prompts, and `scores` for the texts that score."""

    best = 1.0
    scores: Mapping[str, float]

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return Prompt(LETTERS[rng.integers(len(LETTERS))])

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [self.scores.get("".join(completion.text.split()), 0.0) for completion in completions]

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        texts = tuple(self.scores)
        return texts[rng.integers(len(texts))]


class Bandit(Probe):
    """Choose one of four letters: `BANDIT_SCORES`; any other text scores 0.

    The score does not depend on the prompt. Both splits have the same four prompts, because the optimum is known and
    there is no generalisation to test.
    """

    name = "bandit"
    scores = BANDIT_SCORES


class Tree(Probe):
    """Write up to three letters: `TREE_SCORES`; any other text scores 0.

    Strings that begin with "a" have the highest mean score, but the best string is "cdb", so a greedy choice of the
    first letter fails. The score does not depend on the prompt. Both splits have the same four prompts, because the
    optimum is known and there is no generalisation to test.
    """

    name = "tree"
    scores = TREE_SCORES
