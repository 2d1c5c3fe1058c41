"""Learning to summarize from human feedback (Stiennon et al. 2020).

The paper finds that a reward model gains 1.1 % accuracy with each doubling of the comparisons; that people prefer the
texts of PPO to those of the supervised model it started from, also where length is controlled for, because longer
summaries win; and that reward models like length more than people do. It trains several reward models and keeps the one
that is best on validation.

What differs here: a "summary" is a text of up to five letters, by a random language model of 19,000 parameters
(`agents/studies/letter_world.py`), which is the supervised model. Gold likes the letter c and dislikes d, per letter;
annotators follow gold, but also like each further letter a little. PPO is `agents/ppo.py` on the reward model's
normalised scores. Win rates are by gold, between texts that both policies write (`agents.experiments.win_rates`). The
value function starts from the policy's trunk, and not from the reward model as in the paper.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

import lmgym
from agents import ppo, reward_modelling
from agents.experiments.win_rates import length_controlled_win_rate, win_rate, wins
from agents.pipeline import RLOptions, Setting, build_training
from agents.studies.form import Claim, Panel
from agents.studies.letter_world import PROMPT, Letters, LetterWorld, lmgym_text, train_reward_model, tree_of
from agents.studies.token_world import points
from lmgym.exact import policy_logp
from lmgym.reward import RewardModel

TITLE = "Stiennon et al. 2020: doublings of data, win rates, length"
PAPER = "https://arxiv.org/abs/2009.01325"

CLAIMS = (
    Claim("slope", "accuracy of the reward model rises with each doubling of the comparisons: slope", low=0.0),
    Claim("selected_less_mean", "the model that validation selects is better than the mean of three: test accuracy",
          low=0.0),
    Claim("win_rate", "PPO's texts win against those of the supervised model", low=0.6),
    Claim("win_rate_controlled", "and at equal length", low=0.5),
    Claim("raw_less_controlled", "length explains a part of the raw win rate", low=0.0),
    Claim("length_bias", "the reward model likes length: its score of a further letter at equal gold", low=0.0),
)  # fmt: skip
PANELS = (
    Panel("data", "Accuracy of the reward model", "log₂ comparisons", "accuracy on pairs"),
    Panel("ppo", "PPO on the reward model", "update", "win rate against the start, by gold"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 20
    """Independent reward models and policies."""
    letters: int = 5
    """Most letters of a text."""
    sizes: tuple[int, ...] = (75, 150, 300, 600, 1200)
    """Numbers of comparisons: four doublings."""
    updates: int = 40
    """PPO's updates."""
    rows: int = 128
    """Completions per update."""
    pairs: int = 1000
    """Texts of each policy that are compared."""
    length_bonus: float = 0.15
    """What a further letter is worth to an annotator."""


QUICK = Config(seeds=5)
SMOKE = Config(seeds=3, letters=3, sizes=(20, 40), updates=2, rows=16, pairs=100)


def gold(text: str) -> float:
    """Share of letters c less share of letters d."""
    return (text.count("c") - text.count("d")) / max(1, len(text))


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of some reward models and one policy."""
    rng, world = np.random.default_rng(seed), LetterWorld.make(config.letters)

    def judged(text: str) -> float:
        return 2 * gold(text) + config.length_bonus * len(text)

    comparisons = world.compare(rng, judged, max(config.sizes))
    models = {size: train_reward_model(world.lm, comparisons[:size], seed % 2**31) for size in config.sizes}
    test, validation = (world.compare(rng, judged, 1000) for _ in range(2))
    accuracy = [reward_modelling.evaluate(model, test)["accuracy/test"] for model in models.values()]
    middle = comparisons[: config.sizes[len(config.sizes) // 2]]
    others = [train_reward_model(world.lm, middle, (seed + k) % 2**31) for k in (1, 2, 3)]
    checked = [[reward_modelling.evaluate(m, pairs)["accuracy/test"] for m in others] for pairs in (validation, test)]
    model = models[max(config.sizes)]
    curve, raw, controlled = train(config, world, model, rng, seed % 2**31)
    measures = {
        "slope": float(np.polyfit(np.log2(config.sizes), accuracy, 1)[0]),
        "selected_less_mean": checked[1][int(np.argmax(checked[0]))] - float(np.mean(checked[1])),
        "win_rate": raw,
        "win_rate_controlled": controlled,
        "raw_less_controlled": raw - controlled,
        "length_bias": length_bias(world, world.scores(model)),
    }
    data = {"accuracy": points(np.log2(config.sizes), accuracy)}
    return {"measures": measures, "curves": {"data": data, "ppo": {"win rate": curve}}}


def length_bias(world: LetterWorld, scores: np.ndarray) -> float:
    """The regression coefficient of the scores on length at equal gold, in standard deviations of the scores."""
    weight = np.sqrt(world.reference)
    scores = (scores - world.reference @ scores) / np.sqrt(world.reference @ (scores - world.reference @ scores) ** 2)
    design = np.stack([np.ones_like(scores), world.gold(gold), world.gold(len)], 1)
    return float(np.linalg.lstsq(design * weight[:, None], scores * weight, rcond=None)[0][2])


def train(
    config: Config, world: LetterWorld, model: RewardModel, rng: np.random.Generator, seed: int
) -> tuple[list[list[float]], float, float]:
    """PPO on the reward model; the win rate after each fifth update, and at the end also at equal length."""
    sample = rng.choice(len(world.texts), size=256, p=world.reference)
    reward_modelling.normalise(model, [lmgym_text(world.texts[i]) for i in sample], [world.finished[i] for i in sample])
    tree, golds = tree_of(world.lm, config.letters), world.gold(gold)
    rl = RLOptions(lr=3e-3, rows=config.rows, critic="head", beta=0.05)
    settings = ppo.Config(updates=config.updates, minibatch_rows=config.rows // 2)
    budgets = {"max_prompt_tokens": 1, "max_new_tokens": config.letters}
    setup = build_training(Setting(Letters(gold, model), lmgym.load("probe"), budgets, seed=seed), rl, settings)
    theirs = rng.choice(len(golds), size=config.pairs, p=world.reference)
    curve = [[0.0, 0.5]]
    ours = theirs
    for number, _ in enumerate(setup.train(ppo, settings), start=1):
        if number % 5 == 0 or number == config.updates:
            policy = np.exp(policy_logp(tree, setup.policy.log_probs).numpy())
            ours = rng.choice(len(golds), size=config.pairs, p=policy / policy.sum())
            curve.append([float(number), win_rate(wins(golds[ours], golds[theirs])).value])
    # Of an empty text, the prompt is the whole length.
    own, other = (np.array([len(lmgym_text(world.texts[i])) for i in drawn]) for drawn in (ours, theirs))
    controlled = length_controlled_win_rate(wins(golds[ours], golds[theirs]), own, other)
    assert lmgym_text("") == PROMPT.text
    return curve, curve[-1][1], controlled.value
