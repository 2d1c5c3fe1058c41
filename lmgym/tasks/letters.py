"""Small tasks on the letters a to d, one capability each: the benchmark suite `text-v1` is made of them.

They are for the "probe" model. Most can be enumerated, so that their optimum is known exactly. Except where a docstring
says otherwise, the score does not depend on the prompt, and both splits have the same four prompts.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np

from lmgym.tasks.base import Completion, Prompt, Split
from lmgym.tasks.probe import BANDIT_SCORES, LETTERS, TREE_SCORES, Probe


class Letters(Probe):
    """A task whose score is a function of the letters written, without spaces."""

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [self.score_text(p, "".join(c.text.split()), c) for p, c in zip(prompts, completions, strict=True)]

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        """The score of one completion, whose letters are `text`."""
        raise NotImplementedError

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        return "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(1, 4)))


class ScaledBandit(Letters):
    """`Bandit`, with scores that are multiplied by a factor. An algorithm should not depend on the unit of the score.

    Args:
        factor: multiplies the scores.
    """

    name = "scaled_bandit"

    def __init__(self, factor: float = 100.0):
        self.factor = factor
        self.best = factor

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return self.factor * BANDIT_SCORES.get(text, 0.0)


SmallBandit = partial(ScaledBandit, 0.01)
"""The same with scores of at most 0.01."""


class Noisy(Letters):
    """Normal noise on the score that learners see. The gold score has no noise.

    A prompt carries the seed of its noise, so that noise is new in every episode, and a run can be repeated. The
    completions of one group have different noise, unless they are equal.

    Args:
        sigma: the noise's standard deviation.
    """

    def __init__(self, sigma: float = 1.0):
        self.sigma = sigma

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        prompt = super().sample(rng, split)
        return Prompt(prompt.text, {"noise": int(rng.integers(2**62))})

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return super().score(prompts, completions)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        gold = self.gold(prompts, completions)
        return [g + self.sigma * _normal(p, c) for g, p, c in zip(gold, prompts, completions, strict=True)]


class NoisyTree(Noisy):
    """`Tree`, with noise. The scores are between 0 and 1."""

    name = "noisy_tree"

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return TREE_SCORES.get(text, 0.0)


def _normal(prompt: Prompt, completion: Completion) -> float:
    """A number from N(0, 1) that the prompt's seed and the completion determine; 0 for a prompt without a seed."""
    if "noise" not in prompt.data:
        return 0.0
    key = f"{prompt.data['noise']}/{completion.text}/{completion.tokens}".encode()
    return float(np.random.default_rng(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")).normal())


class FirstLetter(Letters):
    """Only the first letter counts (as in `Bandit`), however long the text is: which action earned the score?"""

    name = "first_letter"

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return BANDIT_SCORES.get(text[:1], 0.0)


class Password(Letters):
    """Write exactly the key. Nothing else scores, except a decoy of one letter, which pays a little.

    The reward is sparse: an algorithm must find the key by chance, and not give up exploring for the decoy.

    Args:
        key: pays 1.
        decoy: pays 0.05.
    """

    name = "password"

    def __init__(self, key: str = "cab", decoy: str = "d"):
        self.key, self.decoy = key, decoy

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return 1.0 if text == self.key else 0.05 * (text == self.decoy)

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        return self.key if rng.random() < 0.5 else super().demonstrate(prompt, rng)


class Goodhart(Letters):
    """The score counts the letter "a", up to `most`; the gold score falls again after the second one.

    A policy that follows the score too far loses what it stands for: the gold score first rises with KL and then falls.

    Args:
        most: this many letters have the best score.
    """

    name = "goodhart"

    def __init__(self, most: int = 4):
        self.most = most

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        return min(text.count("a"), self.most) / self.most

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [max(0.0, 1.0 - 0.5 * abs("".join(c.text.split()).count("a") - 2)) for c in completions]


class Count(Letters):
    """Write as many letters as the prompt says (a: 1, b: 2, c: 3, d: 4), and stop.

    Each letter too many or too few costs 0.25. A text that does not end scores 0.
    """

    name = "count"

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        if completion.finish_reason != "stop":
            return 0.0
        return max(0.0, 1.0 - 0.25 * abs(len(text) - 1 - LETTERS.find(prompt.text)))


class FewPrompts(Letters):
    """Repeat the first two of the prompt's three letters in alphabetical order, after few training prompts.

    The test prompts are all others, so that the gold score measures generalisation. Each letter that is right at its
    position pays 0.5; a text of another length than two scores 0.

    Args:
        train_prompts: number of training prompts, of 64.
    """

    name = "few_prompts"

    def __init__(self, train_prompts: int = 16):
        texts = ["".join(letters) for letters in product(LETTERS, repeat=3)]
        order = np.random.default_rng(0).permutation(len(texts))
        shuffled = [texts[i] for i in order]
        self.prompts = {"train": shuffled[:train_prompts], "test": shuffled[train_prompts:]}

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return Prompt(self.prompts[split][rng.integers(len(self.prompts[split]))])

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        wanted = "".join(sorted("".join(prompt.text.split())[:2]))
        return 0.5 * sum(a == b for a, b in zip(wanted, text, strict=False)) if len(text) == len(wanted) else 0.0

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        return "".join(sorted("".join(prompt.text.split())[:2]))


class Both(Letters):
    """Two objectives that conflict; the lower one counts.

    The share of letters that are "a" or "b", and the number of different letters out of four. The best text has four
    letters, one of which is "c" or "d", such as "abac": both objectives are 0.75.
    """

    name = "both"
    best = 0.75

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        mood = sum(letter in "ab" for letter in text) / max(1, len(text))
        return min(mood, len(set(text)) / len(LETTERS))


class Alternate(Letters):
    """Letters of the first half of the alphabet ("a", "b") and of the second half ("c", "d") must alternate.

    The score is the length of the longest beginning that alternates, as a share of `length`: a long horizon.

    Args:
        length: this many letters score 1.
    """

    name = "alternate"

    def __init__(self, length: int = 16):
        self.length = length

    def score_text(self, prompt: Prompt, text: str, completion: Completion) -> float:
        halves = [letter in "ab" for letter in text]
        right = next((i for i in range(1, len(halves)) if halves[i] == halves[i - 1]), len(halves))
        return min(1.0, right / self.length)
