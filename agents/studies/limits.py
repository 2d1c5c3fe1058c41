"""Limits and ethics: bias, lost diversity, and whose preferences win (Gabriel 2020; Casper et al. 2023).

The list of works that asked for this study names "The Limitations of RLHF", Gabriel et al. 2020, with a link that is
not that paper. It builds on Gabriel 2020, "Artificial intelligence, values, and alignment"
(https://arxiv.org/abs/2001.09768), who asks whose values a system should follow, and on Casper et al. 2023, "Open
problems and fundamental limitations of reinforcement learning from human feedback". They argue that annotators' biases
pass into the reward model and the policy, that RL narrows what a policy says, and that one reward model cannot serve
annotators who disagree.

What differs here: texts of up to five letters, reward models of a random language model of 19,000 parameters that are
trained by `agents.reward_modelling`, and the exact optimum for them at each β (`agents/studies/letter_world.py`). The
gold rule likes the letter c and dislikes d. A biased annotator also likes a and dislikes b, which stand for two groups
of people. The minority of annotators likes what the majority dislikes.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from agents.evaluate import distinct, self_bleu
from agents.experiments.bias_probes import PLACE, BiasProbe, paired_probe
from agents.studies.form import Claim, Panel
from agents.studies.letter_world import LetterWorld, lmgym_text, train_reward_model
from agents.studies.token_world import points, spearman
from lmgym.reward import RewardModel

TITLE = "Limits of RLHF: bias, diversity, minorities"
PAPER = "https://arxiv.org/abs/2307.15217"

CLAIMS = (
    Claim("planted_p", "a paired-template probe finds a planted bias of the annotator in the reward model: p-value",
          high=0.01, kind="count", enough=0.9),
    Claim("planted_effect", "the planted bias, in standard deviations of the scores", low=0.0),
    Claim("fair_effect", "without a bias of the annotator, none is found: 0", 0.0, 0.0, "contains"),
    Claim("amplified_rank", "the policy's bias grows with KL: rank correlation", low=0.8),
    Claim("amplified", "letters a less letters b per text, at the largest KL less at the start", low=0.0),
    Claim("distinct_lost", "distinct pairs of letters that are lost from the start to the largest KL", low=0.0),
    Claim("self_bleu_gained", "self-BLEU that is gained", low=0.0),
    Claim("entropy_lost", "entropy of a text that is lost, in nats", low=0.0),
    Claim("majority_accuracy", "20 % of the annotators want the opposite: accuracy for the majority", low=0.5),
    Claim("minority_accuracy", "and for the minority", high=0.5),
)  # fmt: skip
PANELS = (
    Panel("bias", "Bias of the policy", "KL, nats", "letters a less letters b per text"),
    Panel("diversity", "Diversity of its texts", "KL, nats", "share of that at the start"),
    Panel("groups", "Accuracy for each group", "share of the minority", "share of pairs in its order"),
)
BETAS = (10.0, 3.0, 1.5, 1.0, 0.7, 0.5, 0.35, 0.25)


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 40
    """Independent sets of comparisons and reward models."""
    comparisons: int = 600
    """Pairs that a reward model is trained on."""
    bias: float = 0.7
    """Gold score of a letter a, and loss of a letter b, to the biased annotator."""
    shares: tuple[float, ...] = (0.0, 0.2, 0.4)
    """Shares of the minority; the claims are about the second one."""
    letters: int = 5
    """Most letters of a text."""
    texts: int = 300
    """Texts whose diversity is measured."""


QUICK = Config(seeds=10)
SMOKE = Config(seeds=3, comparisons=100, shares=(0.0, 0.2), letters=4, texts=50)


def gold(text: str) -> float:
    """The rule of the majority."""
    return float(text.count("c") - text.count("d"))


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of one set of reward models."""
    rng, world = np.random.default_rng(seed), LetterWorld.make(config.letters)

    def biased_gold(text: str) -> float:
        return gold(text) + config.bias * (text.count("a") - text.count("b"))

    biased = train_reward_model(world.lm, world.compare(rng, biased_gold, config.comparisons), seed % 2**31)
    fair = train_reward_model(world.lm, world.compare(rng, gold, config.comparisons), seed % 2**31)
    planted, unbiased = probe(biased), probe(fair)
    policies = [world.reference, *(world.optimum(standardised(world, biased), beta) for beta in BETAS)]
    nats = [world.kl(policy) for policy in policies]
    gap = np.array([text.count("a") - text.count("b") for text in world.texts])
    bias = [float(policy @ gap) for policy in policies]
    kept = [diversity(world, policy, rng, config.texts) for policy in policies]
    groups = accuracies(world, rng, config, seed % 2**31)
    measures = {
        "planted_p": planted.difference.p_value if planted.difference.p_value is not None else 1.0,
        "planted_effect": planted.effect,
        "fair_effect": unbiased.effect,
        "amplified_rank": spearman(nats, bias),
        "amplified": bias[-1] - bias[0],
        "distinct_lost": kept[0]["distinct pairs"] - kept[-1]["distinct pairs"],
        "self_bleu_gained": kept[-1]["self-BLEU"] - kept[0]["self-BLEU"],
        "entropy_lost": kept[0]["entropy"] - kept[-1]["entropy"],
        "majority_accuracy": groups["majority"][1][1],
        "minority_accuracy": groups["minority"][1][1],
    }
    shown = {name: points(nats, [k[name] / kept[0][name] for k in kept]) for name in kept[0]}
    return {
        "measures": measures,
        "curves": {"bias": {"policy": points(nats, bias)}, "diversity": shown, "groups": groups},
    }


def probe(model: RewardModel) -> BiasProbe:
    """All texts of four letters with one place for the group, and c or d elsewhere."""
    rest = [list(letters) for letters in product("cd", repeat=3)]
    templates = [lmgym_text("".join([*r[:i], PLACE, *r[i:]])) for r in rest for i in range(4)]
    return paired_probe(lambda texts: model.score_texts([*texts]).tolist(), templates, ["a"], ["b"])


def standardised(world: LetterWorld, model: RewardModel) -> np.ndarray:
    """The scores of all texts, in standard deviations of the reference's."""
    scores = world.scores(model)
    mean = world.reference @ scores
    return (scores - mean) / np.sqrt(world.reference @ (scores - mean) ** 2)


def diversity(world: LetterWorld, policy: np.ndarray, rng: np.random.Generator, count: int) -> dict[str, float]:
    """Of texts that are drawn from a policy, with letters for words; the entropy is exact."""
    drawn = [" ".join(world.texts[i]) for i in rng.choice(len(policy), size=count, p=policy)]
    held = policy[policy > 0]
    return {
        "distinct pairs": distinct(drawn, 2),
        "self-BLEU": self_bleu(drawn),
        "entropy": float(-(held * np.log(held)).sum()),
    }


def accuracies(world: LetterWorld, rng: np.random.Generator, config: Config, seed: int) -> dict[str, Any]:
    """For each group, the share of pairs of texts that a reward model of both groups' labels puts in its order."""
    found: dict[str, Any] = {"majority": [], "minority": []}
    golds = world.gold(gold)
    first, second = rng.choice(len(golds), size=(2, 4000), p=world.reference)
    differ = golds[first] != golds[second]
    wanted = (golds[first] > golds[second])[differ]
    for share in config.shares:
        few = round(share * config.comparisons)
        comparisons = world.compare(rng, gold, config.comparisons - few)
        comparisons += world.compare(rng, lambda text: -gold(text), few)
        rng.shuffle(comparisons)  # pyright: ignore[reportArgumentType] (a list is shuffled in place)
        scores = world.scores(train_reward_model(world.lm, comparisons, seed))
        agreed = float(((scores[first] > scores[second])[differ] == wanted).mean())
        found["majority"].append([share, agreed])
        found["minority"].append([share, 1 - agreed])
    return found
