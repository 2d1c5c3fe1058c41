"""Write a positive review: a small version of the task of Ziegler et al. 2019, section 3.1.

Paper: https://arxiv.org/abs/1909.08593.
"""

import re
from collections.abc import Sequence

import numpy as np

from lmgym.tasks.base import Completion, Prompt, ScoreFunction, Split, Task, sample_in_split
from lmgym.tasks.grammar import continuation, opening, polarity, unfinished_sentence


class Sentiment(Task):
    """Continue the opening of a review or story with positive sentences.

    The task is for learning from preferences. `score` comes from a reward model. `gold` is a rule that no learner sees;
    it shows whether a policy writes better texts or only exploits the reward model.

    Args:
        scorer: the reward model, or any other callable that scores a batch of completions.
        demonstration_positivity: the probability that a sentence of a demonstration is positive.
    """

    name = "sentiment"
    best = 1.0
    # One standard deviation below the mean of the reward model's scores, which are normalised.
    missing_eos_score = -1.0

    def __init__(self, scorer: ScoreFunction | None = None, demonstration_positivity: float = 0.4):
        self.scorer = scorer
        self.demonstration_positivity = demonstration_positivity

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return sample_in_split(lambda: Prompt(opening(rng)), split)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        if self.scorer is None:
            raise ValueError(
                "the task 'sentiment' needs a learned reward model for its score, but has none: pass one as "
                "Sentiment(scorer=reward_model). gold() is for evaluation only; to train on it anyway, make it as "
                "Sentiment(scorer=Sentiment().gold)"
            )
        return self.scorer(prompts, completions)

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        """(positive sentences − negative sentences) / max(3, sentences).

        A repeated sentence counts as neutral, and so does a last sentence without an end mark. If the prompt ends in
        the middle of a sentence, that sentence and the start of the completion are read as one.
        """
        return [gold_sentiment(p.text, c.text) for p, c in zip(prompts, completions, strict=True)]

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        return continuation(rng, prompt.text, self.demonstration_positivity)


def gold_sentiment(prompt: str, completion: str) -> float:
    """`Sentiment.gold` of one text, in [-1, 1]."""
    sentences = re.findall(r"[^.!?]*[.!?]+|[^.!?]+$", f"{unfinished_sentence(prompt)}{completion}")
    said: set[tuple[str, ...]] = set()
    total = count = 0
    for sentence in sentences:
        words = tuple(re.findall(r"[\w']+", sentence.lower()))
        if not words:
            continue
        count += 1
        if words not in said and sentence.endswith((".", "!", "?")):
            total += polarity(sentence)
        said.add(words)
    return total / max(3, count)
