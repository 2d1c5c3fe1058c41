"""Training a helpful and harmless assistant with RLHF (Bai et al. 2022).

The paper finds that reward grows linearly with √KL, that preference models are calibrated, that the reward of the model
that is trained on runs ahead of that of a model of held-out comparisons, that helpfulness and harmlessness pull in
different directions, and that weekly rounds of new comparisons help.

What differs here: texts of 24 independent tokens, linear preference models, and policies that are exact optima at a
given KL (`agents/studies/token_world.py`). Helpful and harmless are two gold scores with a correlation of −0.5. The
paper's own comparisons (`Anthropic/hh-rlhf`) are not used.

The first law has a reason: for a small tilt of the reference along a score of standard deviation σ, the score rises by
σ √(2 KL).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from agents import functional as F
from agents.studies.form import Claim, Panel
from agents.studies.token_world import TokenWorld, Weights, collected, fit, points, spearman
from lmgym.preferences import SimulatedAnnotator

TITLE = "Bai et al. 2022: √KL, calibration, two halves, two aims"
PAPER = "https://arxiv.org/abs/2204.05862"

CLAIMS = (
    Claim("sqrt_r2", "the reward is linear in √KL up to 2 nats: R²", low=0.95),
    Claim("slope", "its slope, divided by √2 σ of the reference's scores", 0.9, 1.1, "identity"),
    Claim("ece", "the preference model is calibrated on labels without errors: expected calibration error", high=0.05),
    Claim("halves", "reward by the train half less that by the test half grows from 1 to 36 nats", low=0.0),
    Claim("helpful_rank", "more helpful comparisons in the mixture, more helpful: rank correlation", low=0.8),
    Claim("harmless_rank", "and less harmless: rank correlation", high=-0.8),
    Claim("iterated_less_static", "four online rounds give more gold at equal KL than one static set", low=0.0),
)
PANELS = (
    Panel("law", "Reward against √KL", "√KL, √nats", "reward, in σ of the reference's scores"),
    Panel("halves", "Two halves of the comparisons", "√KL, √nats", "reward"),
    Panel("mixture", "Mixtures of comparisons, at 6 nats", "share that is helpful", "gold above the reference"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 40
    """Independent worlds."""
    comparisons: int = 3200
    """Labels of a preference model."""
    half: int = 400
    """Labels of each half."""
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Shares of helpful comparisons."""
    held_out: int = 20000
    """Pairs for the calibration."""


QUICK = Config(seeds=10)
SMOKE = Config(seeds=3, comparisons=400, half=100, held_out=2000, shares=(0.0, 0.5, 1.0))


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of one world."""
    rng = np.random.default_rng(seed)
    world = TokenWorld.draw(rng)
    weights = learned(world, rng, config.comparisons)
    law, slope, r2 = square_root_law(world, weights)
    gap = halves(world, rng, config)
    mixed = mixture(world, rng, config)
    tired, labels = replace(world, tiring=1.0), config.comparisons // 4
    online, static = (
        collected(tired, np.random.default_rng(seed), [labels] * 4, 6.0, online=flag)[-1] for flag in (True, False)
    )
    measures = {
        "sqrt_r2": r2,
        "slope": slope,
        "ece": calibration(world, rng, weights, config.held_out),
        "halves": (gap["train"][-1][1] - gap["test"][-1][1]) - (gap["train"][0][1] - gap["test"][0][1]),
        "helpful_rank": spearman(config.shares, [y for _, y in mixed["helpful"]]),
        "harmless_rank": spearman(config.shares, [y for _, y in mixed["harmless"]]),
        "iterated_less_static": online - static,
    }
    return {"measures": measures, "curves": {"law": law, "halves": gap, "mixture": mixed}}


def learned(world: TokenWorld, rng: np.random.Generator, comparisons: int) -> Weights:
    """A preference model of comparisons of the reference's texts, without wrong labels."""
    texts = world.pairs(rng, world.reference, comparisons)
    return fit(*world.compare(rng, *texts, SimulatedAnnotator(0.0, scale=1.0)))


def square_root_law(world: TokenWorld, weights: Weights) -> tuple[dict[str, Any], float, float]:
    """The curve up to 2 nats, its slope through the origin over √2 σ, and the R² of a line."""
    nats = np.linspace(0.02, 2.0, 40)
    policies = world.frontier(weights, nats)
    centred = weights - world.reference @ weights
    sigma = float(np.sqrt(world.length * world.reference @ centred**2))
    root, reward = np.sqrt(world.kl(policies)), world.expected(weights, policies) / sigma
    slope = float(root @ reward / (root @ root)) / 2**0.5
    residuals = reward - np.polyval(np.polyfit(root, reward, 1), root)
    r2 = float(1 - (residuals**2).sum() / ((reward - reward.mean()) ** 2).sum())
    return {"measured": points(root, reward), "√2 σ √KL": points(root, np.sqrt(2) * root)}, slope, r2


def calibration(world: TokenWorld, rng: np.random.Generator, weights: Weights, pairs: int) -> float:
    """Expected calibration error of σ(score difference), each pair in both orders."""
    texts = world.pairs(rng, world.reference, pairs)
    better, worse = world.compare(rng, *texts, SimulatedAnnotator(0.0, scale=1.0))
    margins = torch.tensor((better - worse) @ weights)
    both = torch.cat([margins, -margins])
    outcome = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)]).bool()
    return float(F.expected_calibration_error(both.float().sigmoid(), outcome))


def halves(world: TokenWorld, rng: np.random.Generator, config: Config) -> dict[str, Any]:
    """Reward of the optima for the train half, by the train half and by the test half, each in its own σ."""
    train, test = (learned(world, rng, config.half) for _ in range(2))
    nats = np.linspace(1.0, 6.0, 16) ** 2
    policies = world.frontier(train, nats)
    curves = {}
    for name, weights in (("train", train), ("test", test)):
        centred = weights - world.reference @ weights
        sigma = np.sqrt(world.length * world.reference @ centred**2)
        curves[name] = points(np.sqrt(nats), world.expected(weights, policies) / sigma)
    return curves


def mixture(world: TokenWorld, rng: np.random.Generator, config: Config) -> dict[str, Any]:
    """Both gold scores at 6 nats, for preference models of mixtures of both kinds of comparisons."""
    noise = rng.normal(0, world.worth.std(), len(world.worth))
    harmless = replace(world, worth=-0.5 * world.worth + np.sqrt(0.75) * (noise - noise @ world.reference))
    found: dict[str, Any] = {"helpful": [], "harmless": []}
    for share in config.shares:
        sides = [
            side.compare(rng, *side.pairs(rng, side.reference, count), SimulatedAnnotator(0.0, scale=1.0))
            for side, count in (
                (world, round(share * config.comparisons)),
                (harmless, round((1 - share) * config.comparisons)),
            )
        ]
        better, worse = (np.concatenate([side[i] for side in sides]) for i in (0, 1))
        policy = world.optimum_at(fit(better, worse), 6.0)
        found["helpful"].append([share, float(world.expected_gold(policy))])
        found["harmless"].append([share, float(harmless.expected_gold(policy))])
    return found
