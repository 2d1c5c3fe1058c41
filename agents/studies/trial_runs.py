"""Trial runs on 5 to 10 % of the data (advice of Encora, Prem AI and SuperAnnotate), and how far to trust them.

Guides to fine-tuning advise to train on a small part of the data first, and to decide by what that gives. Stiennon et
al. 2020 found 1.1 % more accuracy with each doubling of the comparisons, which is a straight line in the logarithm of
their number. Here the runs on 1, 2, 5 and 10 % are extrapolated to 100 % by `agents.experiments.extrapolation`, and
compared with the full run.

What differs here: texts of 24 independent tokens and a linear reward model (`agents/studies/token_world.py`), tested on
pairs without wrong labels, which the prediction is not told. The guides give no claim that could be tested; the claims
are this package's own. A straight line for the accuracy promises too much, because accuracies bend as they near their
ceiling. A line for the log-odds of (a − ½) to (1 − a) bends, but its band held in 7 of 10 seeds only: a linear model's
curve has another form, and the band knew of the scatter of the runs alone. `extrapolate_accuracy` averages over forms
and ceilings (docs/decisions.md).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.experiments.extrapolation import extrapolate, extrapolate_accuracy
from agents.experiments.statistics import Estimate
from agents.studies.form import Claim, Panel
from agents.studies.token_world import TokenWorld, fit, points
from lmgym.preferences import SimulatedAnnotator

TITLE = "Trial runs: what 1 to 10 % of the data say about all of them"
PAPER = "https://arxiv.org/abs/2009.01325"

CLAIMS = (
    Claim("in_band", "the full run's accuracy lies in the predicted 90 % band (1: yes)", low=1.0, kind="count"),
    Claim("band_width", "width of this band", high=0.1),
    Claim("promised_less_reached", "predicted less measured accuracy of the full run", -0.02, 0.02),
    Claim("line_in_band", "the same with a straight line for the accuracy itself (1: yes)", low=1.0, kind="count"),
    Claim("line_less_reached", "and its predicted less measured accuracy", -0.02, 0.02),
    Claim("slope", "accuracy rises with each doubling of the comparisons", low=0.0),
)
PANELS = (Panel("accuracy", "Accuracy of the reward model", "log₂ comparisons", "accuracy on pairs"),)

TESTED = 20_000
"""Pairs on which accuracies are measured."""


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 40
    """Independent worlds."""
    full: int = 16000
    """Comparisons of the full run."""
    shares: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1)
    """Shares of the trial runs."""
    repeats: int = 3
    """Trial runs of each share, on different parts of the data."""
    tokens: int = 256
    """Tokens of a world: the weights of a reward model."""


QUICK = Config(seeds=10)
SMOKE = Config(seeds=3, full=1000, shares=(0.05, 0.1, 0.2), repeats=2, tokens=32)


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of one world."""
    sizes, values, full = curve(config, np.random.default_rng(seed))
    line, bent = extrapolate(sizes, values, config.full), extrapolate_accuracy(sizes, values, config.full, TESTED)
    measures = {
        "in_band": float(inside(bent, full)),
        "band_width": (bent.high or 1.0) - (bent.low or 0.0),
        "promised_less_reached": bent.value - full,
        "line_in_band": float(inside(line, full)),
        "line_less_reached": line.value - full,
        "slope": float(np.polyfit(np.log2(sizes), values, 1)[0]),
    }
    means = [float(np.mean(values[i : i + config.repeats])) for i in range(0, len(values), config.repeats)]
    end = np.log2([config.full])
    shown = {
        "measured": points(np.log2([*sizes[:: config.repeats], config.full]), [*means, full]),
        "predicted, averaged forms": points(end, [bent.value]),
        "predicted, straight line": points(end, [line.value]),
    }
    return {"measures": measures, "curves": {"accuracy": shown}, "trials": points(sizes, values), "full": full}


def inside(told: Estimate, value: float) -> bool:
    """Whether a value lies in the band."""
    return told.low is not None and told.high is not None and told.low <= value <= told.high


def curve(config: Config, rng: np.random.Generator) -> tuple[list[float], list[float], float]:
    """Sizes and accuracies of the trial runs, and the accuracy of the full run."""
    world, annotator = TokenWorld.draw(rng, config.tokens), SimulatedAnnotator(0.0, scale=1.0)
    texts = world.pairs(rng, world.reference, config.full)
    better, worse = world.compare(rng, *texts, annotator)
    first, second = (world.sample(rng, world.reference, TESTED) for _ in range(2))
    wanted = world.gold(first) > world.gold(second)

    def accuracy(rows: np.ndarray) -> float:
        weights = fit(better[rows], worse[rows])
        return float(((first @ weights > second @ weights) == wanted).mean())

    sizes, values = [], []
    for share in config.shares:
        size = round(share * config.full)
        for _ in range(config.repeats):
            sizes.append(float(size))
            values.append(accuracy(rng.choice(config.full, size, replace=False)))
    return sizes, values, accuracy(np.arange(config.full))
