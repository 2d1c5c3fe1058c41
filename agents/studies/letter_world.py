"""A world of short texts of the letters a to d, with real language models, reward models and RL on top.

The model is "probe" (19,000 random parameters, six tokens). After one prompt every completion of up to T letters can
be listed, so that the KL-regularised optimum of any score is exact (`lmgym.exact`), and reward models are compared with
the gold score on all texts. A reward model of a few hundred comparisons is trained in a second.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import lmgym
from agents import reward_modelling
from agents.learner import Learner, LearnerConfig
from lmgym.exact import Tree, enumerate_tree
from lmgym.preferences import Comparison, SimulatedAnnotator
from lmgym.reward import RewardModel
from lmgym.tasks.base import Completion, Prompt, Split, Task

Rule = Callable[[str], float]
"""The gold score of a completion's letters."""
PROMPT = Prompt("a")


class Letters(Task):
    """Complete one prompt; the score is a rule on the letters of the completion.

    Args:
        rule: the gold score.
        scorer: the score that is learned from; None: the rule.
    """

    name = "letters"

    def __init__(self, rule: Rule, scorer: Any = None):
        self.rule, self.scorer = rule, scorer

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return PROMPT

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return self.gold(prompts, completions) if self.scorer is None else self.scorer(prompts, completions)

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [self.rule(completion.text) for completion in completions]


@dataclass(frozen=True)
class LetterWorld:
    """All completions of the prompt, and their probability under the reference.

    Attributes:
        lm: the model.
        texts: the N completions.
        finished: whether each ended before the token budget.
        reference: [N] π_ref.
        letters: the most letters of a completion.
    """

    lm: lmgym.LanguageModel
    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    reference: Float[ndarray, " N"]
    letters: int

    @classmethod
    @cache
    def make(cls, letters: int = 5) -> "LetterWorld":
        """Lists all completions of up to so many letters."""
        lm = lmgym.load("probe")
        tree = tree_of(lm, letters)
        prompt = lm.text.encode_prompts([PROMPT])[0]
        texts = tuple(lm.text.decode_completion(prompt, list(path)) for path in tree.paths)
        finished = tuple(path[-1] in lm.eos_ids for path in tree.paths)
        reference = np.exp(tree.reference_logp.numpy())
        return cls(lm, texts, finished, reference / reference.sum(), letters)

    def gold(self, rule: Rule) -> Float[ndarray, " N"]:
        """The gold score of every text."""
        return np.array([rule(text) for text in self.texts], dtype=np.float64)

    def scores(self, model: RewardModel) -> Float[ndarray, " N"]:
        """A reward model's score of every text."""
        texts = [lmgym_text(text) for text in self.texts]
        return (model.score_texts(texts, self.finished, rows=512) - model.shift).double().numpy()

    def optimum(self, scores: Float[ndarray, " N"], beta: float) -> Float[ndarray, " N"]:
        """π*(y) ∝ π_ref(y) exp(score(y) / β), of every text."""
        logits = np.log(self.reference) + scores / beta
        policy = np.exp(logits - logits.max())
        return policy / policy.sum()

    def kl(self, policy: Float[ndarray, " N"]) -> float:
        """KL(π ‖ π_ref), in nats."""
        held = policy > 0
        return float((policy[held] * np.log(policy[held] / self.reference[held])).sum())

    def compare(
        self, rng: np.random.Generator, rule: Rule, count: int, completions: int = 2, annotator: Any = None
    ) -> list[Comparison]:
        """Rankings of different completions of the reference, by an annotator who follows the rule."""
        annotator, golds = annotator or SimulatedAnnotator(0.0, scale=2.0), self.gold(rule)
        found = []
        while len(found) < count:
            drawn = rng.choice(len(self.texts), size=completions, p=self.reference)
            if len(set(drawn)) == completions:
                order = annotator.rank([float(golds[i]) for i in drawn], rng)
                found.append(Comparison(PROMPT.text, tuple(self.texts[drawn[i]] for i in order)))
        return found


def lmgym_text(completion: str) -> str:
    """A completion behind the prompt, as a reward model reads it."""
    return f"{PROMPT.text}{completion}"


def tree_of(lm: lmgym.LanguageModel, letters: int, score: Any = None, beta: float = 1.0) -> Tree:
    """Every completion of up to so many letters, with a score."""
    env = lmgym.TokenVectorEnv(
        1, task=Letters(lambda text: 0.0, score), model=lm, max_prompt_tokens=1, max_new_tokens=letters,
        kl="reference", beta=beta,
    )  # fmt: skip
    return enumerate_tree(env, PROMPT)


def train_reward_model(
    lm: lmgym.LanguageModel, comparisons: Sequence[Comparison], seed: int, epochs: int = 1, **config: Any
) -> RewardModel:
    """A reward model of all weights, from comparisons."""
    model = RewardModel.from_language_model(lm, rank=0, seed=seed)
    learner = Learner(model.parameters(), LearnerConfig(lr=3e-3), seed)
    settings = reward_modelling.Config(epochs=epochs, **config)
    for _ in reward_modelling.train(model, comparisons, [], learner, settings):
        pass
    return model
