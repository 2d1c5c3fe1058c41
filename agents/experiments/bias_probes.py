"""Paired-template probes: does a score or a policy treat two groups differently where nothing else differs?

Bai et al. 2022, section 4.6 (https://arxiv.org/abs/2204.05862) ask this of 76 occupations with pairs of gendered words;
the design is that of Zhao et al. 2018, "WinoBias" (https://arxiv.org/abs/1804.06876).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtr, stdtrit

from agents.experiments.statistics import Estimate

PLACE = "{group}"
"""Where a template names the group."""


@dataclass(frozen=True)
class BiasProbe:
    """What a probe found.

    Attributes:
        difference: mean over templates of the score with the first group's words less that with the second's, with
            the interval and p-value of the paired t test. 0 is unbiased.
        effect: the difference in standard deviations of all scores of the probe.
        pairs: the difference of each template.
    """

    difference: Estimate
    effect: float
    pairs: tuple[float, ...]


def fill(templates: Sequence[str], words: Sequence[str]) -> list[str]:
    """Every template with every word, templates first.

    Raises:
        ValueError: a template does not name the group.
    """
    wrong = [template for template in templates if PLACE not in template]
    if wrong:
        raise ValueError(f"the template {wrong[0]!r} does not name a group: put {PLACE} where its word belongs")
    return [template.replace(PLACE, word) for template in templates for word in words]


def paired_probe(
    score: Callable[[Sequence[str]], Any],
    templates: Sequence[str],
    first: Sequence[str],
    second: Sequence[str],
    confidence: float = 0.95,
) -> BiasProbe:
    """Scores each template with the words of two groups, and tests whether the mean difference is 0.

    Templates are the units of the test: the words of a group are averaged first, because scores of the same template
    are not independent. For a reward model, `score` is its `score_texts`; for a policy, the log-probability of a text.

    Args:
        score: returns one number for each text, as a list, an array or a tensor.
        templates: texts with `{group}` where the words go, at least two.
        first: words of the first group, such as ("he", "the man").
        second: words of the second group.
        confidence: coverage of the interval.

    Raises:
        ValueError: there are too few templates, no words, or a template without a place for them.
    """
    if len(templates) < 2 or not first or not second:
        raise ValueError(
            f"a probe needs at least two templates and a word for each group, not {len(templates)} templates and "
            f"{len(first)} and {len(second)} words"
        )
    found = [
        np.asarray(score(fill(templates, words)), dtype=np.float64).reshape(len(templates), len(words))
        for words in (first, second)
    ]
    if not all(np.isfinite(scores).all() for scores in found):
        raise ValueError("a score of the probe is not finite")
    pairs = found[0].mean(1) - found[1].mean(1)
    mean, error = float(pairs.mean()), float(pairs.std(ddof=1) / np.sqrt(len(pairs)))
    spread = float(np.concatenate([scores.ravel() for scores in found]).std())
    effect = mean / spread if spread else 0.0
    if not error:
        # Also an exactly equal treatment, or one whose difference does not depend on the template.
        return BiasProbe(Estimate(mean, note="the templates do not differ"), effect, tuple(pairs.tolist()))
    degrees = float(len(pairs) - 1)
    half = float(stdtrit(degrees, 0.5 + confidence / 2)) * error
    p_value = float(2 * stdtr(degrees, -abs(mean) / error))
    return BiasProbe(Estimate(mean, mean - half, mean + half, degrees, p_value), effect, tuple(pairs.tolist()))
