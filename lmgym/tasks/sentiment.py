"""Write a review that a reader finds positive: the task of Ziegler et al. 2019 (section 3.1), in small."""

import re
from collections.abc import Sequence

import numpy as np

from lmgym.tasks.base import Completion, Prompt, ScoreFunction, Split, Task, sample_in_split
from lmgym.tasks.grammar import continuation, opening, polarity, unfinished_sentence


class Sentiment(Task):
    """Continue the opening of a review or story; the more positive sentences, the better.

    It is made to be learned from preferences: `score` is a reward model's, and `gold`, a rule that no learner sees,
    tells whether the reward model was improved or only fooled.

    Args:
        scorer: the reward model, or any other callable that scores a batch of completions.
        demonstration_positivity: how probable each sentence of a demonstration is to be positive.
    """

    name = "sentiment"
    best = 1.0
    # A standard deviation below the mean of the reward model's scores, which are normalised.
    missing_eos_score = -1.0

    def __init__(self, scorer: ScoreFunction | None = None, demonstration_positivity: float = 0.4):
        self.scorer = scorer
        self.demonstration_positivity = demonstration_positivity

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return sample_in_split(lambda: Prompt(opening(rng)), split)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        if self.scorer is None:
            raise ValueError(
                "the task 'sentiment' is scored by a learned reward model and has none: pass one as "
                "Sentiment(scorer=reward_model). gold() is for evaluation only; to be paid by it all the same, say so "
                "with Sentiment(scorer=Sentiment().gold)"
            )
        return self.scorer(prompts, completions)

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        """Positive sentences less negative ones, over the number of sentences or 3, whichever is more.

        A sentence that was said before counts as neutral, and so does a last one without its end mark. Where the
        prompt breaks off within a sentence, the completion's first words are read together with it.
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
