"""What to ask next: at random, or where an ensemble of reward models is least sure.

A fixed share of the questions is always random, and is asked about held-out prompts: what it says about a reward model
is unbiased, whatever the rest is chosen by. The probability of each choice is stored with it.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

Strategy = Literal["random", "disagreement", "margin", "newest"]
RANDOM_SHARE = 0.2
"""The least share of the questions that is drawn at random."""
TOP = 0.1
"""An active strategy draws from this share of the items, those that it values most."""


@dataclass(frozen=True)
class Query:
    """A choice of what to ask.

    Attributes:
        index: of the item.
        strategy: what chose it.
        propensity: the probability with which this item was chosen, whatever chose it.
    """

    index: int
    strategy: Strategy
    propensity: float


def disagreement(scores: Float[ndarray, "K N T"]) -> Float[ndarray, " N"]:
    """How much K reward models disagree on each item: the variance over members of P(first is better).

    P is that of Bradley and Terry, σ(score difference). With more than two texts it is the mean over pairs of texts.
    Christiano et al. 2017, section 2.2.4 (https://arxiv.org/abs/1706.03741).

    Args:
        scores: of K members for N items with T texts; NaN where an item has fewer texts, or no scores.

    Raises:
        ValueError: there is one member, which cannot disagree.
    """
    if len(scores) < 2:
        raise ValueError("one reward model cannot disagree: give the scores of at least 2, or ask by margin")
    preferred = (1 + np.tanh(_margins(scores) / 2)) / 2  # σ, without overflow
    return _over_pairs(np.var(preferred, axis=0, ddof=1))


def margin(scores: Float[ndarray, "K N T"]) -> Float[ndarray, " N"]:
    """How near the texts of each item are: minus the absolute difference of their mean scores over members.

    With more than two texts it is the mean over pairs of texts. Lewis and Gale 1994 (https://arxiv.org/abs/cmp-lg/9407020)
    call this uncertainty sampling.

    Args:
        scores: as for `disagreement`.
    """
    return _over_pairs(-np.abs(_margins(scores).mean(axis=0)))


def largest(values: Float[ndarray, " N"], count: int) -> Int[ndarray, " count"]:
    """The indices of the `count` largest values, the largest first; the earlier one of equal values comes first.

    Raises:
        ValueError: there are fewer values.
    """
    if not 0 <= count <= len(values):
        raise ValueError(f"{count} queries were requested, and there are {len(values)} candidates")
    return np.argsort(-values, kind="stable")[:count]


def propensities(
    strategy: Strategy, batches: Int[ndarray, " N"], scores: Float[ndarray, "K N T"] | None
) -> Float[ndarray, " N"] | None:
    """The probability of each of N items under a strategy alone; None if it needs scores and has no scores.

    Args:
        strategy: "random": all alike. "newest": those of the newest batch, alike. "disagreement" and "margin": those in
            the top tenth by `disagreement` and `margin`, alike.
        batches: the number of the batch in which each item was added.
        scores: as for `disagreement`.
    """
    if strategy == "random":
        chosen = np.ones(len(batches), bool)
    elif strategy == "newest":
        chosen = batches == batches.max()
    else:
        value = None if scores is None else (disagreement if strategy == "disagreement" else margin)(scores)
        if value is None or not np.isfinite(value).any():
            return None
        value = np.where(np.isfinite(value), value, -np.inf)
        count = max(1, int(TOP * np.isfinite(value).sum()))
        chosen = np.zeros(len(value), bool)
        chosen[largest(value, count)] = True
    return chosen / chosen.sum()


def choose(
    strategy: Strategy,
    is_test: Bool[ndarray, " N"],
    batches: Int[ndarray, " N"],
    scores: Float[ndarray, "K N T"] | None,
    rng: np.random.Generator,
    random_share: float = RANDOM_SHARE,
) -> Query:
    """Chooses one of N items.

    With the probability `random_share` it is a held-out item, at random. Otherwise it is an item to train on: again
    with `random_share` at random, and else by the strategy. Where the strategy needs scores and no item has any, it
    is at random.

    Args:
        strategy: how to choose.
        is_test: whether an item is held out.
        batches: as for `propensities`.
        scores: as for `disagreement`.
        rng: the source of randomness.
        random_share: at least `RANDOM_SHARE`.

    Raises:
        ValueError: the share is too small, the strategy is unknown, or there is no item.
    """
    if not RANDOM_SHARE <= random_share <= 1:
        raise ValueError(
            f"a random share of {random_share} is out of range: give {RANDOM_SHARE} to 1; without it, the accuracy of "
            "a reward model could not be measured"
        )
    if strategy not in get_args(Strategy) or not len(is_test):
        raise ValueError(
            f"the strategy {strategy!r} for {len(is_test)} items; known are {', '.join(get_args(Strategy))}"
        )
    test_share = float(is_test.mean()) if is_test.all() or not is_test.any() else random_share
    is_held_out = bool(rng.random() < test_share)
    group = np.flatnonzero(is_test == is_held_out)
    uniform = np.full(len(group), 1 / len(group))
    own = None
    if not is_held_out:
        own = propensities(strategy, batches[group], None if scores is None else scores[:, group])
    active = own is not None and bool(rng.random() >= random_share)
    place = int(rng.choice(len(group), p=own if active else uniform))
    mixed = uniform if own is None else random_share * uniform + (1 - random_share) * own
    share = test_share if is_held_out else 1 - test_share
    return Query(int(group[place]), strategy if active else "random", float(share * mixed[place]))


def _margins(scores: Float[ndarray, "K N T"]) -> Float[ndarray, "K N pairs"]:
    first, second = np.triu_indices(scores.shape[2], 1)
    return scores[..., first] - scores[..., second]


def _over_pairs(values: Float[ndarray, "N pairs"]) -> Float[ndarray, " N"]:
    """The mean over pairs that are not NaN; NaN where all are NaN."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.divide(total, known.sum(axis=1), out=np.full(len(values), np.nan), where=known.any(axis=1))
