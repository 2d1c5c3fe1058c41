"""Deep reinforcement learning from human preferences (Christiano et al. 2017).

The paper learns a reward from comparisons of clips, while a policy learns from the reward. It asks about the pairs on
which an ensemble of reward models disagrees, takes into account that a tenth of the answers is random, and collects
comparisons while the policy learns.

What differs here: clips are texts of 24 independent tokens, reward models are linear in the tokens' counts, and the
policy is the exact optimum for the reward model at a given KL (`agents/studies/token_world.py`). Annotators are
simulated. The members of an ensemble are trained on draws with replacement, and queries chosen, by the functions that
`lmgym train --reward.ensemble 5 --preferences.queries disagreement` uses.

The paper itself finds that queries by disagreement sometimes hurt; the verdict on them is about this world.

Changed after pilot runs, before the run that is shown: the gold score's loss by repetition became linear.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from agents.reward_modelling import bootstrap
from agents.studies.form import Claim, Panel
from agents.studies.token_world import Counts, TokenWorld, Weights, collected, fit, points, spearman
from lmgym.preferences import SimulatedAnnotator
from lmgym.preferences.queries import disagreement, largest

TITLE = "Christiano et al. 2017: reward ensembles, chosen queries, wrong labels"
PAPER = "https://arxiv.org/abs/1706.03741"
RATES = (0.05, 0.17)
"""Rates of wrong labels: 10 % of random answers, and the agreement of the annotators of Stiennon et al. 2020."""

CLAIMS = (
    Claim("noise_aware_05", "with 5 % of labels wrong, the noise-aware likelihood finds the true scale", 0.92, 1.08),
    Claim("noise_aware_17", "the same with 17 % wrong", 0.92, 1.08),
    Claim("plain_05", "with 5 % wrong, plain Bradley-Terry shrinks the scores", high=0.92),
    Claim("plain_17", "the same with 17 % wrong", high=0.92),
    Claim("active_less_random", "queries by disagreement give a better ranking of tokens than random ones", low=0.0),
    Claim("spread_ratio", "members differ more about unusual texts than about usual ones: ratio of spreads", low=1.5),
    Claim("online_less_offline", "comparisons collected online give more gold at equal KL than offline ones", low=0.0),
    Claim("annealed_less_even", "fewer labels in later rounds (annealing) give more gold than even rounds", low=0.0),
)
PANELS = (
    Panel("queries", "Rank correlation with the true worths", "labels", "rank correlation"),
    Panel("online", "Gold score at equal KL after each round", "round", "gold score above the reference"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 40
    """Independent worlds."""
    noisy_pairs: int = 8000
    """Comparisons for the likelihoods."""
    members: int = 5
    """Reward models in an ensemble."""
    labels: int = 200
    """Labels that queries are chosen for, in steps of a tenth."""
    candidates: int = 400
    """Candidate pairs of each step."""
    rounds: int = 4
    """Rounds of online collection."""
    round_labels: int = 400
    """Labels of a round."""
    nats: float = 16.0
    """KL of the policy, in nats."""


QUICK = Config(seeds=10)
SMOKE = Config(seeds=3, noisy_pairs=1000, members=3, labels=40, candidates=40, rounds=2, round_labels=100)


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of one world."""
    rng = np.random.default_rng(seed)
    world, measures = TokenWorld.draw(rng), {}
    for rate in RATES:
        for name, told in (("noise_aware", rate), ("plain", 0.0)):
            measures[f"{name}_{100 * rate:02.0f}"] = scale_found(config, world, np.random.default_rng(seed), rate, told)
    curves = {by: query_curve(config, world, np.random.default_rng(seed), by) for by in ("disagreement", "random")}
    measures["active_less_random"] = float(
        np.mean([a[1] - r[1] for a, r in zip(curves["disagreement"], curves["random"], strict=True)][1:])
    )
    measures["spread_ratio"] = spread_ratio(config, world, rng)
    tired = TokenWorld(world.reference, world.worth, tiring=1.0)
    total, number = config.rounds * config.round_labels, np.arange(1, config.rounds + 1)
    even = [config.round_labels] * config.rounds
    annealed = (total / number / (1 / number).sum()).round().astype(int).tolist()
    golds = {
        "online": collected(tired, np.random.default_rng(seed), even, config.nats, online=True),
        "offline": collected(tired, np.random.default_rng(seed), even, config.nats, online=False),
        "annealed": collected(tired, np.random.default_rng(seed), annealed, config.nats, online=True),
    }
    measures["online_less_offline"] = golds["online"][-1] - golds["offline"][-1]
    measures["annealed_less_even"] = golds["annealed"][-1] - golds["online"][-1]
    rounds = {how: points(number, gold) for how, gold in golds.items()}
    return {"measures": measures, "curves": {"queries": curves, "online": rounds}}


def scale_found(config: Config, world: TokenWorld, rng: np.random.Generator, rate: float, told: float) -> float:
    """The slope of the fitted worths on the true ones: 1 if the scale is right."""
    texts = world.pairs(rng, world.reference, config.noisy_pairs)
    better, worse = world.compare(rng, *texts, SimulatedAnnotator(rate, scale=1.0))
    found, true = fit(better, worse, told, l2=0.0), world.worth - world.worth.mean()
    return float(found @ true / (true @ true))


def ensemble(config: Config, better: Counts, worse: Counts, seed: int) -> list[Weights]:
    """Members that are trained on draws with replacement; each is normalised by its own spread over the tokens."""
    members = []
    for member in range(config.members):
        rows = bootstrap(range(len(better)), seed, member)
        weights = fit(better[rows], worse[rows], l2=0.01)
        members.append((weights - weights.mean()) / max(1e-9, weights.std()))
    return members


def query_curve(config: Config, world: TokenWorld, rng: np.random.Generator, by: str) -> list[list[float]]:
    """Rank correlation of the learned worths with the true ones, as labels are added."""
    annotator, step = SimulatedAnnotator(0.0, scale=1.0), config.labels // 10
    better, worse = (np.zeros((0, len(world.worth)), dtype=np.int64) for _ in range(2))
    curve = []
    for number in range(10):
        first, second = (world.sample(rng, world.reference, config.candidates) for _ in range(2))
        chosen = np.arange(step)
        if by == "disagreement" and number:
            members = ensemble(config, better, worse, number)
            scores = np.stack([np.stack([first @ w, second @ w], -1) for w in members])
            chosen = largest(disagreement(scores), step)
        one, other = world.compare(rng, first[chosen], second[chosen], annotator)
        better, worse = np.concatenate([better, one]), np.concatenate([worse, other])
        curve.append([float(len(better)), spearman(fit(better, worse, l2=0.01), world.worth)])
    return curve


def spread_ratio(config: Config, world: TokenWorld, rng: np.random.Generator) -> float:
    """Spread of the members' scores of texts of rare tokens, divided by that of texts of the reference."""
    texts = world.pairs(rng, world.reference, config.round_labels)
    members = ensemble(config, *world.compare(rng, *texts, SimulatedAnnotator(0.0, scale=1.0)), seed=0)
    rare = 1 / world.reference
    found = []
    for policy in (rare / rare.sum() * (rare > np.median(rare)), world.reference):
        counts = world.sample(rng, policy / policy.sum(), 500)
        scores = np.stack([counts @ weights for weights in members])
        found.append(float(scores.std(0, ddof=1).mean()))
    return found[0] / found[1]
