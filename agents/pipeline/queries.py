"""Choosing which prompts annotators see: half of the comparisons at random, the rest where reward models are unsure."""

from collections.abc import Sequence
from typing import Literal

from lmgym.preferences.queries import disagreement, largest, margin
from lmgym.reward import RewardEnsemble, RewardModel, read_text
from lmgym.tasks.base import Completion, Prompt

Queries = Literal["random", "disagreement", "margin"]
"""How the pairs are chosen that annotators compare."""
MEMBERS = 3
"""Minimum number of reward models whose disagreement is measured."""


def most_informative(
    model: RewardModel | RewardEnsemble,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    count: int,
    queries: Queries,
) -> list[int]:
    """The indices of the prompts whose completions to compare.

    The value of a prompt is the mean over all pairs of its completions.

    Args:
        model: of "disagreement", an ensemble.
        prompts: the candidates.
        groups: the completions of each, the same number for all.
        count: how many to choose.
        queries: "disagreement" or "margin".
    """
    flat = [(prompt, c) for prompt, group in zip(prompts, groups, strict=True) for c in group]
    texts = [read_text(prompt, completion.text) for prompt, completion in flat]
    finished = [completion.finish_reason == "stop" for _, completion in flat]
    members = isinstance(model, RewardEnsemble)
    found = model.member_scores(texts, finished) if members else model.score_texts(texts, finished)[None]
    scores = found.double().numpy().reshape(len(found), len(prompts), -1)
    return largest((disagreement if queries == "disagreement" else margin)(scores), count).tolist()
