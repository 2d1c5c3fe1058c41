"""Fine-tuning language models from human preferences (Ziegler et al. 2019).

The paper trains a reward model on choices of the best of four texts, normalises its scores to mean 0 and standard
deviation 1 on samples of the initial policy, and then runs PPO with a penalty on KL whose coefficient follows a target:
e = clip(KL / target − 1, ±0.2), β ← β (1 + 0.1 e), from β = 0.15. Texts that do not end in time score −1. It draws the
score against KL beside the closed-form optimum. Without the penalty, texts are gibberish that the reward model likes.

What differs here: texts of up to five letters, and a random language model of 19,000 parameters, whose every completion
can be listed (`agents/studies/letter_world.py`). The gold rule likes one letter a in a text, and dislikes more; the
reference seldom writes more, so that annotators hardly ever see what is wrong with them. (In a first trial two letters
were good, and gold rose without the penalty; that is why there is one now.) Comparisons are collected once. PPO is
`agents/ppo.py`, with this package's settings for small models.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

import lmgym
from agents import ppo, reward_modelling
from agents.pipeline import RLOptions, Setting, build_training
from agents.studies.form import Claim, Panel
from agents.studies.letter_world import Letters, LetterWorld, lmgym_text, train_reward_model
from agents.studies.token_world import points
from lmgym.reward import RewardModel
from lmgym.tasks.base import ScoreFunction

TITLE = "Ziegler et al. 2019: best of four, a KL target, and what happens without"
PAPER = "https://arxiv.org/abs/1909.08593"

CLAIMS = (
    Claim("choice_accuracy", "a reward model learns from choices of the best of four: accuracy on pairs", low=0.6),
    Claim("normalised", "its scores of the reference's samples have mean 0 and deviation 1: largest error", high=1e-3,
          kind="identity"),
    Claim("kl_2", "the controller holds KL at 2 nats: ratio to the target", 0.85, 1.15, "identity"),
    Claim("kl_6", "and at 6 nats", 0.85, 1.15, "identity"),
    Claim("of_optimum", "at 2 nats, PPO's score is close to the closed-form optimum: share of its gain", low=0.8),
    Claim("ended", "texts that end in time, after training less before", low=0.0),
    Claim("proxy_without", "without the penalty, the reward model's score rises", low=0.0),
    Claim("gold_without", "and the gold score falls below that of the start", high=0.0),
)  # fmt: skip
PANELS = (
    Panel("kl", "KL under the controller", "update", "KL, nats"),
    Panel("frontier", "Score against KL", "KL, nats", "reward model's score"),
    Panel("without", "Without a penalty", "update", "score"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 20
    """Independent reward models and policies."""
    letters: int = 5
    """Most letters of a text."""
    choices: int = 1000
    """Choices of the best of four."""
    updates: int = 160
    """PPO's updates with a KL target."""
    free_updates: int = 50
    """And without the penalty."""
    rows: int = 128
    """Completions per update."""
    last: int = 40
    """Updates at the end over which KL and score are averaged."""


QUICK = Config(seeds=5)
SMOKE = Config(seeds=3, letters=3, choices=40, updates=3, free_updates=2, rows=16, last=2)


def gold(text: str) -> float:
    """One letter a is good; each further one takes away more than it gives."""
    count = text.count("a")
    return min(count, 1) - 1.5 * max(0, count - 1)


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of one reward model and three policies."""
    rng, world = np.random.default_rng(seed), LetterWorld.make(config.letters)
    choices = world.compare(rng, gold, config.choices, completions=4)
    model = train_reward_model(world.lm, choices, seed % 2**31, epochs=2, loss="choice")
    sample = rng.choice(len(world.texts), size=256, p=world.reference)
    texts, ended = [lmgym_text(world.texts[i]) for i in sample], [world.finished[i] for i in sample]
    reward_modelling.normalise(model, texts, ended)
    after = model.score_texts(texts, ended) - model.shift

    runs = {target: train(config, model, seed, float(target)) for target in (2, 6)}
    free = train(config, model, seed, 0.0)
    ends = {target: mean_of_last(curve, config.last) for target, curve in runs.items()}
    scores = np.where(world.finished, world.scores(model), -1.0)
    nats, best = frontier(world, scores)
    start, optimum = float(world.reference @ scores), float(np.interp(ends[2]["kl"], nats, best))
    first, last = (mean_of_last(part, 5) for part in (free[:5], free))
    measures = {
        "choice_accuracy": accuracy(world, rng, model),
        "normalised": max(abs(float(after.mean())), abs(float(after.std()) - 1)),
        "kl_2": ends[2]["kl"] / 2,
        "kl_6": ends[6]["kl"] / 6,
        "of_optimum": (ends[2]["score"] - start) / (optimum - start),
        "ended": ends[2]["finished"] - float(world.reference @ np.array(world.finished)),
        "proxy_without": last["score"] - first["score"],
        "gold_without": last["gold"] - float(world.reference @ world.gold(gold)),
    }
    reached = [[end["kl"], end["score"]] for end in (first, *ends.values())]
    return {
        "measures": measures,
        "curves": {
            "kl": {f"target {t}": points(range(len(c)), [r["kl"] for r in c]) for t, c in runs.items()},
            "frontier": {"closed-form optimum": points(nats, best), "PPO at 0, 2 and 6 nats": reached},
            "without": {name: points(range(len(free)), [row[name] for row in free]) for name in ("score", "gold")},
        },
    }


def train(config: Config, model: ScoreFunction, seed: int, target: float) -> list[dict[str, float]]:
    """PPO on the reward model's score; KL, score, gold and the share of ended texts of each update."""
    rl = RLOptions(
        lr=3e-3, rows=config.rows, critic="head", beta=0.15 if target else 0.0, kl_target_nats=target,
        kl_horizon=10.0 * config.rows,  # β changes by at most 0.1 · 0.2 in an update, as in the paper
    )  # fmt: skip
    settings = ppo.Config(updates=config.updates if target else config.free_updates, minibatch_rows=config.rows // 2)
    task = Letters(gold, model)
    budgets = {"max_prompt_tokens": 1, "max_new_tokens": config.letters, "missing_eos_score": -1.0}
    setup = build_training(Setting(task, lmgym.load("probe"), budgets, seed=seed % 2**31), rl, settings)
    found = []
    for row in setup.train(ppo, settings):
        completions = setup.env.completions()
        found.append({
            "kl": row["kl/sequence_nats"],
            "beta": row["kl/beta"],
            "score": row["score/mean"],
            "gold": float(np.mean(task.gold(setup.env.prompts, completions))),
            "finished": float(np.mean([completion.finish_reason == "stop" for completion in completions])),
        })  # fmt: skip
    return found


def accuracy(world: LetterWorld, rng: np.random.Generator, model: RewardModel) -> float:
    """The share of pairs of texts with different gold scores that a reward model puts in their order."""
    golds, scores = world.gold(gold), world.scores(model)
    first, second = rng.choice(len(golds), size=(2, 4000), p=world.reference)
    differ = golds[first] != golds[second]
    return float(((golds[first] > golds[second]) == (scores[first] > scores[second]))[differ].mean())


def mean_of_last(curve: list[dict[str, float]], count: int) -> dict[str, float]:
    """The mean of each column over the last updates."""
    return {name: float(np.mean([row[name] for row in curve[-count:]])) for name in curve[0]}


def frontier(world: LetterWorld, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """KL and score of the optimum, from weak to strong."""
    policies = [world.optimum(scores, float(beta)) for beta in np.exp(np.linspace(3, -3, 40))]
    return np.array([world.kl(p) for p in policies]), np.array([float(p @ scores) for p in policies])
