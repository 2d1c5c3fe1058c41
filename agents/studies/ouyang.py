"""Training language models to follow instructions with human feedback (InstructGPT; Ouyang et al. 2022).

The paper ranks K = 4 to 9 completions of a prompt, and puts all K (K − 1) / 2 pairs of a ranking into one batch
element: each completion is read once, and the reward model does not overfit as it did on shuffled pairs. To lose less
of what pretraining gave, it adds γ E[log π(x)] on pretraining texts to PPO's objective (PPO-ptx).

What differs here: texts of up to five letters, and a random language model of 19,000 parameters
(`agents/studies/letter_world.py`). The texts of pretraining are the reference's own, so that the rise of the
pretraining loss is KL(π_ref ‖ π), which is computed exactly over all texts. The score of PPO is a rule, and not a
reward model, so that "equal reward" is exact too. Instructions in chat form and the moving average of weights are not
studied.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import lmgym
from agents import functional as F
from agents import ppo, reward_modelling
from agents.learner import Learner, LearnerConfig
from agents.pipeline import RLOptions, Setting, build_training
from agents.studies.form import Claim, Panel
from agents.studies.letter_world import PROMPT, Letters, LetterWorld, tree_of
from agents.studies.token_world import points
from lmgym.exact import Tree, policy_logp
from lmgym.models import Example
from lmgym.preferences import Comparison, SimulatedAnnotator
from lmgym.reward import RewardModel

TITLE = "Ouyang et al. 2022: rankings in one batch element, and PPO-ptx"
PAPER = "https://arxiv.org/abs/2203.02155"

CLAIMS = (
    Claim("gradient", "the gradient of a ranking is the mean of its pairs' gradients: largest difference", high=1e-7,
          kind="identity"),
    Claim("forwards", "a ranking of K texts takes K passes, and its pairs K (K − 1): ratio to 1 / (K − 1)", 1.0, 1.0,
          "identity"),
    Claim("overfit", "shuffled pairs overfit: their held-out loss less that of whole rankings", low=0.0),
    Claim("ptx_ratio", "ptx halves the rise of the pretraining loss at equal reward: ratio", high=0.5),
    Claim("ptx_reward", "and PPO-ptx reaches the reward of PPO: share of its gain", low=0.8),
)  # fmt: skip
PANELS = (
    Panel("rankings", "Held-out loss of the reward model", "epoch", "−log σ(difference), per pair"),
    Panel("ptx", "Pretraining loss against reward", "reward", "KL(reference ‖ policy), nats"),
)


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 20
    """Independent reward models and policies."""
    letters: int = 5
    """Most letters of a text."""
    rankings: int = 150
    """Rankings that a reward model is trained on."""
    completions: int = 6
    """K, completions in a ranking."""
    epochs: int = 3
    """Passes over them."""
    updates: int = 60
    """PPO's updates."""
    rows: int = 128
    """Completions per update."""
    ptx: float = 1.0
    """γ, weight of the pretraining loss."""


QUICK = Config(seeds=5)
SMOKE = Config(seeds=3, letters=3, rankings=12, completions=3, epochs=1, updates=6, rows=16)


def gold(text: str) -> float:
    """The rule of the annotators."""
    return float(text.count("c") - text.count("d"))


def reward(text: str) -> float:
    """The rule that PPO is paid by: letters a, which the reference seldom writes."""
    return float(text.count("a"))


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of two reward models and two policies."""
    rng, world = np.random.default_rng(seed), LetterWorld.make(config.letters)
    annotator = SimulatedAnnotator(0.0, scale=1.0)
    rankings, held_out = (
        world.compare(rng, gold, count, config.completions, annotator) for count in (config.rankings, 200)
    )
    whole, passes = losses(config, rankings, held_out, config.rankings, seed % 2**31)
    pairs = [
        Comparison(ranking.prompt, (ranking.ranked[i], ranking.ranked[j]))
        for ranking in rankings
        for i in range(config.completions)
        for j in range(i + 1, config.completions)
    ]
    shuffled, pair_passes = losses(config, pairs, held_out, config.rankings, seed % 2**31)
    tree = tree_of(world.lm, config.letters)
    plain, ptx = (train(config, world, tree, rng, seed % 2**31, weight) for weight in (0.0, config.ptx))
    common = min(max(x for x, _ in curve) for curve in (plain, ptx))
    level = plain[0][0] + 0.9 * (common - plain[0][0])
    measures = {
        "gradient": gradient_error(config.completions, rng),
        "forwards": passes / pair_passes * (config.completions - 1),
        "overfit": shuffled[-1] - whole[-1],
        "ptx_ratio": at(ptx, level) / at(plain, level),
        "ptx_reward": (ptx[-1][0] - ptx[0][0]) / (plain[-1][0] - plain[0][0]),
    }
    epochs = range(1, config.epochs + 1)
    rankings_shown = {"whole rankings": points(epochs, whole), "shuffled pairs": points(epochs, shuffled)}
    return {"measures": measures, "curves": {"rankings": rankings_shown, "ptx": {"PPO": plain, "PPO-ptx": ptx}}}


def gradient_error(completions: int, rng: np.random.Generator) -> float:
    """The gradient of the ranking loss less the mean of the gradients of its pairs, in double precision."""
    scores = torch.tensor(rng.normal(size=completions), requires_grad=True)
    (together,) = torch.autograd.grad(F.ranking_loss(scores), scores)
    each = [
        torch.autograd.grad(F.ranking_loss(scores[[i, j]]), scores)[0]
        for i in range(completions)
        for j in range(i + 1, completions)
    ]
    return float((together - torch.stack(each).mean(0)).abs().max())


def losses(
    config: Config, comparisons: list[Comparison], held_out: list[Comparison], rankings: int, seed: int
) -> tuple[list[float], int]:
    """The held-out loss after each epoch, and the texts that were read in one epoch of training.

    Both kinds of comparisons take the same number of steps, on the same number of pairs each.
    """
    model = RewardModel.from_language_model(lmgym.load("probe"), rank=0, seed=seed)
    learner = Learner(model.parameters(), LearnerConfig(lr=3e-3, schedule="constant"), seed)
    minibatch = max(1, 6 * len(comparisons) // rankings)
    settings, found, read = reward_modelling.Config(config.epochs, minibatch), [], 0
    steps = -(-len(comparisons) // minibatch)
    forward = model.forward

    def counted(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        nonlocal read
        read += len(input_ids)
        return forward(input_ids, attention_mask)

    model.forward = counted  # type: ignore[method-assign]
    for step, _ in enumerate(reward_modelling.train(model, comparisons, [], learner, settings), start=1):
        if step % steps == 0:
            before = read
            with torch.no_grad():
                scores = reward_modelling.scores_of(model, held_out)
            found.append(float(torch.stack([F.ranking_loss(s) for s in scores]).mean()))
            read = before
    return found, read // config.epochs


def train(
    config: Config,
    world: LetterWorld,
    tree: Tree,
    rng: np.random.Generator,
    seed: int,
    weight: float,
) -> list[list[float]]:
    """PPO on the rule; exact reward and exact rise of the pretraining loss after each update."""
    drawn = rng.choice(len(world.texts), size=1000, p=world.reference)
    examples = [Example.of(PROMPT, world.texts[i], world.finished[i]) for i in drawn]
    rl = RLOptions(lr=3e-3, rows=config.rows, critic="head", beta=0.02)
    settings = ppo.Config(updates=config.updates, minibatch_rows=config.rows // 2, ptx_coef=weight)
    budgets = {"max_prompt_tokens": 1, "max_new_tokens": config.letters}
    setup = build_training(Setting(Letters(reward), lmgym.load("probe"), budgets, seed=seed), rl, settings)
    golds, curve = world.gold(reward), [[float(world.reference @ world.gold(reward)), 0.0]]
    for _ in setup.train(ppo, settings, examples=examples):
        logp = policy_logp(tree, setup.policy.log_probs).numpy()
        curve.append([float(np.exp(logp) @ golds), float(world.reference @ (np.log(world.reference) - logp))])
    return curve


def at(curve: list[list[float]], level: float) -> float:
    """The second number where the first one reaches a level for the first time, between two points of the curve."""
    for (x, y), (next_x, next_y) in pairwise(curve):
        if next_x >= level:
            return y + (next_y - y) * (level - x) / (next_x - x)
    return curve[-1][1]
