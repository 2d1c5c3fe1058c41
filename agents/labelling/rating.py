"""An ensemble of reward models on the labels so far: how right it is, and where its members disagree."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agents import reward_modelling
from agents.learner import Learner
from agents.pipeline import RewardOptions
from agents.pipeline.options import rank_for
from lmgym.models import LanguageModel
from lmgym.preferences import Comparison, LabelStore, comparisons_of
from lmgym.reward import RewardModel, read_text


@dataclass(frozen=True)
class Rated:
    """What was done.

    Attributes:
        labels: labels to train on.
        right, pairs: held-out pairs that the mean score of the ensemble orders as people did, and all of them.
        scored: questions that have scores now.
    """

    labels: int
    right: int
    pairs: int
    scored: int


def train_member(
    lm: LanguageModel, options: RewardOptions, seed: int, comparisons: Sequence[Comparison]
) -> RewardModel:
    """One reward model, without the folder of a run."""
    rank = rank_for(lm, options.lora_rank)
    model = RewardModel.from_language_model(lm, rank, 2 * rank, seed, True)
    learner = Learner(model.parameters(), options, seed)
    for _ in reward_modelling.train(model, comparisons, (), learner, options):
        pass
    return model


def rate_open_items(store: LabelStore, lm: LanguageModel, options: RewardOptions, seed: int, members: int) -> Rated:
    """Trains the ensemble, and writes its accuracy and its scores of the questions that nobody was asked yet.

    Held-out labels are all answers to random questions, so the accuracy is unbiased whatever else was asked.

    Args:
        store: the file of labels.
        lm: the language model to start from.
        options: of the training.
        seed: each member has a seed of its own, spawned from it.
        members: reward models.

    Raises:
        ValueError: there are no labels to train on.
    """
    train, test = comparisons_of(store, "train"), comparisons_of(store, "test")
    if not train:
        raise ValueError(f"{store.path}: no labels to train on yet: answer some questions, not all of them with a tie")
    seeds = np.random.SeedSequence(seed).generate_state(members)
    models = [train_member(lm, options, int(s), train) for s in seeds]
    rows = store.rows("SELECT id FROM items WHERE purpose = 'ask' AND asked_at IS NULL")
    items = [store.item(row["id"]) for row in rows]
    scores = {item.id: _scores(models, Comparison(item.prompt, item.texts, item.messages)).tolist() for item in items}
    right = pairs = 0
    for comparison in test:
        mean = _scores(models, comparison).mean(0)
        margins = (mean[:, None] - mean[None])[np.triu_indices(len(mean), 1)]
        right, pairs = right + int((margins > 0).sum()), pairs + len(margins)
    with store.transaction():
        store.set_scores(scores)
        store.add_training(len(train), lm.name, right, pairs)
    return Rated(len(train), right, pairs, len(scores))


@torch.no_grad()
def _scores(models: Sequence[RewardModel], comparison: Comparison) -> np.ndarray:
    """[K, T] the score of each text by each member."""
    texts = [read_text(comparison.as_prompt, text) for text in comparison.ranked]
    return np.stack([model.raw_scores(texts, [True] * len(texts), rows=16).double().cpu().numpy() for model in models])
