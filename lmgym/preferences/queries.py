"""Which pairs to ask an annotator about: the value of each candidate pair, where larger is asked first.

Scores are [K, N, 2]: of K reward models (the members of an ensemble), for N candidate pairs of texts.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import expit


def disagreement(scores: Float[ndarray, "K N 2"]) -> Float[ndarray, " N"]:
    """The variance over the members of the predicted preference σ(r_a − r_b).

    Christiano et al. 2017, section 2.2.4 (https://arxiv.org/abs/1706.03741).

    Raises:
        ValueError: there is one member, which cannot disagree.
    """
    if len(scores) < 2:
        raise ValueError("one reward model cannot disagree: give the scores of at least 2, or ask by margin")
    return expit(scores[..., 0] - scores[..., 1]).var(0, ddof=1)


def margin(scores: Float[ndarray, "K N 2"]) -> Float[ndarray, " N"]:
    """−|r_a − r_b| of the members' mean score: large where the two texts are almost equal (uncertainty sampling).

    Lewis & Gale 1994 (https://arxiv.org/abs/cmp-lg/9407020).
    """
    return -abs((scores[..., 0] - scores[..., 1]).mean(0))


def largest(values: Float[ndarray, " N"], count: int) -> Int[ndarray, " count"]:
    """The indices of the `count` largest values, the largest first; the earlier one of equal values comes first.

    Raises:
        ValueError: there are fewer values.
    """
    if not 0 <= count <= len(values):
        raise ValueError(f"{count} queries were requested, and there are {len(values)} candidates")
    return np.argsort(-values, kind="stable")[:count]
