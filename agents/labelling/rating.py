"""An ensemble of reward models on the labels so far: how right it is, and where its members disagree."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from agents import reward_modelling
from agents.learner import Learner
from agents.pipeline import RewardOptions
from agents.pipeline.options import rank_for
from lmgym.models import LanguageModel
from lmgym.preferences import Comparison, LabelStore, comparisons_of
from lmgym.reward import RewardEnsemble, RewardModel, read_text


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


def rate_open_items(store: LabelStore, lm: LanguageModel, options: RewardOptions, seed: int, members: int) -> Rated:
    """Trains the ensemble, and writes its accuracy and its scores of the questions that nobody was asked yet.

    Held-out labels are all answers to random questions, so the accuracy is unbiased whatever else was asked.

    Args:
        store: the file of labels.
        lm: the language model to start from.
        options: of the training.
        seed: of all random numbers; each member has a seed and a draw of the labels of its own.
        members: reward models.

    Raises:
        ValueError: there are no labels to train on.
    """
    train, test = comparisons_of(store, "train"), comparisons_of(store, "test")
    if not train:
        raise ValueError(f"{store.path}: no labels to train on yet: answer some questions, not all of them with a tie")
    rank = rank_for(lm, options.lora_rank)
    if members > 1:
        model = RewardEnsemble.from_language_model(lm, members, rank, 2 * rank, seed)
    else:
        model = RewardModel.from_language_model(lm, rank, 2 * rank, seed)
    for _ in reward_modelling.train(model, train, (), Learner(model.parameters(), options, seed), options):
        pass
    rows = store.rows("SELECT id FROM items WHERE purpose = 'ask' AND asked_at IS NULL")
    items = [store.item(row["id"]) for row in rows]
    asked = [Comparison(item.prompt, item.texts, item.messages) for item in items]
    scores = {item.id: found.tolist() for item, found in zip(items, _scores(model, asked), strict=True)}
    right = pairs = 0
    for found in _scores(model, test):
        mean = found.mean(0)
        margins = (mean[:, None] - mean[None])[np.triu_indices(len(mean), 1)]
        right, pairs = right + int((margins > 0).sum()), pairs + len(margins)
    with store.transaction():
        store.set_scores(scores)
        store.add_training(len(train), lm.name, right, pairs)
    return Rated(len(train), right, pairs, len(scores))


def _scores(model: RewardModel | RewardEnsemble, comparisons: Sequence[Comparison]) -> list[Float[ndarray, "K T"]]:
    """For each comparison, the scores of its texts by each member."""
    if not comparisons:
        return []
    texts = [read_text(comparison.as_prompt, text) for comparison in comparisons for text in comparison.ranked]
    found = model.member_scores(texts) if isinstance(model, RewardEnsemble) else model.score_texts(texts)[None]
    ends = np.cumsum([len(comparison.ranked) for comparison in comparisons])[:-1]
    return np.split(found.double().numpy(), ends, axis=1)
