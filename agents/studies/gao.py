"""Scaling laws for reward model overoptimization (Gao, Schulman, Hilton 2022).

The paper trains policies against a proxy reward model and measures them by a gold one. With the distance d = √KL from
the start, gold first rises and then falls, as d (α − β d) for best of n and as d (α − β log d) for RL; with more
comparisons the peak is higher and further away. The list of works that asked for this study names another first author,
and a link that leads elsewhere; this is the paper that is meant.

What differs here: texts of 24 independent tokens; gold is a rule that is tired by repetition, and not a larger reward
model; the proxy is linear in the tokens' counts and trained on labels by gold; the policies of RL are the exact optima
for the proxy at each β, so that no optimiser and no training length plays a part (`agents/studies/token_world.py`).
Best of n is sampled. The paper's proxies differ in size; here, small ones cannot tell some tokens apart.

Changed after pilot runs, before the run that is shown: the loss by repetition became linear, the vocabulary became 32
tokens, and the claims on gold that is lost and on early stopping were stated anew.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import softmax

from agents import functional as F
from agents.studies.form import Claim, Panel
from agents.studies.token_world import TokenWorld, Weights, fit, points, spearman
from lmgym.preferences import SimulatedAnnotator

TITLE = "Gao et al. 2022: gold and proxy under optimisation"
PAPER = "https://arxiv.org/abs/2210.10760"

CLAIMS = (
    Claim("rl_r2", "gold of RL follows d (α − β log d): R² of the fit", low=0.9),
    Claim("bon_r2", "gold of best of n follows d (α − β d): R² of the fit", low=0.9),
    Claim("proxy_monotone", "the proxy rises all the way: smallest step", low=0.0, kind="identity"),
    Claim("gold_turns", "gold rises to one peak and then falls: number of turns", 1.0, 1.0, "count"),
    Claim("peak_rank", "the peak moves right with more comparisons: rank correlation over sizes", low=0.8),
    Claim("width_rank", "larger proxies have a higher peak: rank correlation over sizes", low=0.8),
    Claim("bon_kl_error", "best of n has KL log n − (n − 1)/n: largest relative error", high=0.05, kind="identity"),
    Claim("bon_more_efficient", "at equal KL, best of n has no less gold than RL: difference", low=-0.05),
    Claim(
        "penalty_gain",
        "a KL penalty is no better than early stopping: difference of gold at equal KL, as a share of the peak",
        -0.05,
        0.05,
    ),
)
PANELS = (
    Panel("rl", "RL: proxy and gold", "d = √KL, √nats", "score above the reference"),
    Panel("sizes", "Gold of RL by number of comparisons", "d = √KL, √nats", "gold above the reference"),
    Panel("bon", "Best of n: proxy and gold", "d = √KL, √nats", "score above the reference"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 40
    """Independent worlds."""
    sizes: tuple[int, ...] = (200, 400, 800, 1600, 3200)
    """Numbers of comparisons."""
    vocabulary: int = 32
    """Tokens."""
    widths: tuple[int, ...] = (4, 8, 16, 32)
    """Groups of tokens that a proxy can tell apart."""
    proxies: int = 8
    """Proxies of each size, over which its curve is averaged."""
    points: int = 40
    """Values of β."""
    most_nats: float = 40.0
    """Largest KL of RL, in nats."""
    texts: int = 2000
    """Texts that best of n chooses from."""


QUICK = Config(seeds=10)
SMOKE = Config(seeds=3, sizes=(100, 400), widths=(4, 32), proxies=2, points=8, texts=500)


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of one world."""
    rng = np.random.default_rng(seed)
    world = TokenWorld.draw(rng, config.vocabulary, tiring=1.0)
    nats = np.linspace(0.05, np.sqrt(config.most_nats), config.points) ** 2
    by_size = {size: mean_gold(config, world, rng, size, max(config.widths), nats) for size in config.sizes}
    by_width = {width: mean_gold(config, world, rng, max(config.sizes), width, nats) for width in config.widths}
    peaks = [peak(np.sqrt(nats), gold) for gold in by_size.values()]
    heights = [float(gold.max()) for gold in by_width.values()]

    proxy = learned(world, rng, config.sizes[len(config.sizes) // 2], max(config.widths))
    policies = world.frontier(proxy, nats)
    gold, told = world.expected_gold(policies), world.expected(proxy, policies)
    best = best_of_n(config, world, rng, proxy)
    measures = {
        "rl_r2": r2(np.sqrt(nats), gold, np.log),
        "bon_r2": r2(best["d"], best["gold"], lambda d: d),
        "proxy_monotone": float(np.diff(told).min()),
        "gold_turns": float((np.diff(np.sign(np.diff(gold))) != 0).sum()),
        "peak_rank": spearman(config.sizes, peaks),
        "width_rank": spearman(config.widths, heights),
        "bon_kl_error": float(best["kl_error"]),
        "bon_more_efficient": float(np.mean(best["gold"] - np.interp(best["d"], np.sqrt(nats), gold))),
        "penalty_gain": penalty_gain(world, proxy) / float(gold.max()),
    }
    d = np.sqrt(nats)
    return {
        "measures": measures,
        "curves": {
            "rl": {"proxy": points(d, told), "gold": points(d, gold)},
            "sizes": {f"{size} comparisons": points(d, found) for size, found in by_size.items()},
            "bon": {"proxy": points(best["d"], best["proxy"]), "gold": points(best["d"], best["gold"])},
        },
    }


def learned(world: TokenWorld, rng: np.random.Generator, size: int, width: int) -> Weights:
    """A proxy, trained on comparisons of the reference's texts; it tells `width` groups of tokens apart."""
    texts = world.pairs(rng, world.reference, size)
    better, worse = world.compare(rng, *texts, SimulatedAnnotator(0.0, scale=1.0))
    group = np.eye(width, dtype=np.int64)[np.arange(len(world.worth)) % width]
    return group @ fit(better @ group, worse @ group)


def mean_gold(
    config: Config, world: TokenWorld, rng: np.random.Generator, size: int, width: int, nats: np.ndarray
) -> np.ndarray:
    """Gold at each KL, mean over proxies."""
    proxies = [learned(world, rng, size, width) for _ in range(config.proxies)]
    return np.mean([world.expected_gold(world.frontier(weights, nats)) for weights in proxies], 0)


def best_of_n(config: Config, world: TokenWorld, rng: np.random.Generator, proxy: Weights) -> dict[str, Any]:
    """Gold and proxy of the best of n by the proxy, n = 2, 4, … 256, and how far their KL is from the formula.

    The texts are a sample of the reference; among them, the distribution of the best is exact
    (`agents.functional.best_of_n_probs`).
    """
    # Texts with equal counts are one outcome; each has its share of the sample.
    counts, times = np.unique(world.sample(rng, world.reference, config.texts), axis=0, return_counts=True)
    scores, share = torch.tensor(counts @ proxy), torch.tensor(times / times.sum())
    golds = torch.tensor(world.gold(counts))
    found: dict[str, Any] = {"d": [], "gold": [], "proxy": [], "kl_error": 0.0}
    for n in [2**k for k in range(1, 9)]:
        best, formula = F.best_of_n_probs(scores, share, n), F.best_of_n_kl(n)
        kl = float(torch.special.xlogy(best, best / share).sum())
        found["kl_error"] = max(found["kl_error"], abs(kl - formula) / formula)
        found["d"].append(formula**0.5)
        found["gold"].append(float((best - share) @ golds))
        found["proxy"].append(float((best - share) @ scores))
    return {name: np.array(values) for name, values in found.items()}


def peak(d: np.ndarray, gold: np.ndarray) -> float:
    """Where gold is largest: the vertex of the parabola through the largest value and its neighbours."""
    at = int(gold.argmax())
    if at in (0, len(d) - 1):
        return float(d[at])
    a, b, _ = np.polyfit(d[at - 1 : at + 2], gold[at - 1 : at + 2], 2)
    return float(-b / (2 * a))


def penalty_gain(world: TokenWorld, proxy: Weights) -> float:
    """Gold along gradient ascent on the proxy less β · KL, less that of ascent without a penalty at equal KL."""
    free_kl, free_gold = ascent(world, proxy, 0.0)
    gains = []
    for beta in (0.1, 0.3):
        kl, gold = ascent(world, proxy, beta)
        gains += (gold - np.interp(kl, free_kl, free_gold)).tolist()
    return float(np.mean(gains))


def ascent(world: TokenWorld, proxy: Weights, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """KL and gold on the way of exact gradient ascent on the logits, from the reference."""
    start = logits = np.log(world.reference)
    found = []
    for _ in range(1000):
        policy = softmax(logits)
        found.append(policy)
        reward = proxy - beta * (logits - start)
        logits = logits + policy * (reward - policy @ reward)
    policies = np.stack(found)
    return world.kl(policies), world.expected_gold(policies)


def r2(d: np.ndarray, gold: np.ndarray, shape: Any) -> float:
    """R² of the least-squares fit of d (α − β shape(d))."""
    design = np.stack([d, d * shape(d)], 1)
    fitted = design @ np.linalg.lstsq(design, gold, rcond=None)[0]
    return float(1 - ((gold - fitted) ** 2).sum() / ((gold - gold.mean()) ** 2).sum())
