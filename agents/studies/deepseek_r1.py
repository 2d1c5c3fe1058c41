"""DeepSeek-R1: reasoning by reinforcement learning on rules alone (DeepSeek-AI 2025).

The list of works that asked for this study names a course video about the paper. R1-Zero starts GRPO from a pretrained
model without fine-tuning, and pays only rules: is the answer right, and has it the right form? A reward model would be
exploited. Distilling a large model that RL has trained into a small one beats RL on the small one.

What differs here: the task is to write two letters in the opposite order, the model has 19,000 random parameters and
has learned nothing before, and there is no reasoning to grow: the length of answers only falls to the right one. The
rules are the same two. The student is the same model without its second layer; it is trained by RL and by distillation
on the same number of sampled tokens. The run of this package on a real model of 135 million parameters is in
docs/real_models.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

import lmgym
from agents import distill, grpo, ppo, rloo
from agents.pipeline import RLOptions, Setting, build_training
from agents.studies.form import Claim, Panel
from agents.studies.token_world import points
from lmgym.policy import Policy
from lmgym.tasks.base import Completion, Prompt, Split, Task

TITLE = "DeepSeek-R1: rules alone, and distillation"
PAPER = "https://arxiv.org/abs/2501.12948"

CLAIMS = (
    Claim("grpo", "GRPO on rules learns the task without fine-tuning: share of right answers", low=0.8),
    Claim("start", "which the untrained model almost never solves: its share", high=0.05),
    Claim("format_first", "the form is learned before the answer: updates to half of the right answers less updates to "
          "half of the right form", low=0.0),
    Claim("rloo_less_grpo", "RLOO is within 5 points of GRPO", -0.05, 0.05),
    Claim("ppo_less_grpo", "and PPO", -0.05, 0.05),
    Claim("distilled_less_rl", "distilling the teacher into a half-size student beats RL on the student", low=0.0),
)  # fmt: skip
PANELS = (
    Panel("algorithms", "From rules alone", "update", "share of right answers"),
    Panel("rules", "GRPO", "update", "share, or tokens / 4"),
    Panel("student", "The student of half the size", "update", "share of right answers"),
)
BUDGETS: dict[str, Any] = {"max_prompt_tokens": 2, "max_new_tokens": 4}


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 10
    """Independent runs."""
    updates: int = 150
    """Updates of each run."""
    rows: int = 256
    """Completions per update."""
    lr: float = 1e-2
    """Peak learning rate."""


QUICK = Config(seeds=3)
SMOKE = Config(seeds=3, updates=2, rows=32)


class Opposite(Task):
    """Write the two letters of the prompt in the opposite order, and end: 1 if right, and 0.2 for any two letters."""

    name = "opposite"
    best = 1.2

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return Prompt("".join("abcd"[i] for i in rng.integers(4, size=2)))

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [is_right(p, c) + 0.2 * has_form(c) for p, c in zip(prompts, completions, strict=True)]


def is_right(prompt: Prompt, completion: Completion) -> bool:
    """The rule for the answer."""
    return has_form(completion) and completion.text == prompt.text[::-1]


def has_form(completion: Completion) -> bool:
    """The rule for the form: two letters, and the end."""
    return completion.finish_reason == "stop" and len(completion.text) == 2


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of three algorithms, and of a student that learns in two ways."""
    seed %= 2**31
    curves, policies = {}, {}
    for name, module, settings in (
        ("GRPO", grpo, grpo.Config(config.updates, group=16)),
        ("RLOO", rloo, rloo.Config(config.updates, group=16)),
        ("PPO", ppo, ppo.Config(config.updates, minibatch_rows=config.rows // 2)),
    ):
        curves[name], policies[name] = train(config, module, settings, lmgym.load("probe"), seed)
    student, _ = train(config, grpo, grpo.Config(config.updates, group=16), half(lmgym.load("probe")), seed)
    distilled, _ = train(
        config, distill, distill.Config(config.updates), half(lmgym.load("probe")), seed, teacher=policies["GRPO"]
    )
    ends = {name: curve[-1]["right"] for name, curve in curves.items()}
    found = curves["GRPO"]
    measures = {
        "grpo": ends["GRPO"],
        "start": found[0]["right"],
        "format_first": float(first(found, "right") - first(found, "form")),
        "rloo_less_grpo": ends["RLOO"] - ends["GRPO"],
        "ppo_less_grpo": ends["PPO"] - ends["GRPO"],
        "distilled_less_rl": distilled[-1]["right"] - student[-1]["right"],
    }
    return {
        "measures": measures,
        "curves": {
            "algorithms": {name: shown(curve, "right") for name, curve in curves.items()},
            "rules": {name: shown(found, name) for name in ("right", "form", "length")},
            "student": {"RL": shown(student, "right"), "distilled": shown(distilled, "right")},
        },
    }


def half(lm: lmgym.LanguageModel) -> lmgym.LanguageModel:
    """The model without its second layer."""
    lm.model.transformer.h = lm.model.transformer.h[:1]
    lm.model.config.n_layer = 1
    return lmgym.LanguageModel(lm.model, lm.tokenizer, "half of the probe")


def train(
    config: Config, module: ModuleType, settings: Any, lm: lmgym.LanguageModel, seed: int, **extra: Any
) -> tuple[list[dict[str, float]], Policy]:
    """One algorithm on the rules; each tenth update, what the policy does on 256 prompts. Returns also the policy."""
    task = Opposite()
    rl = RLOptions(lr=config.lr, rows=config.rows, lora_rank=16, critic="head" if module is ppo else "none", beta=0.001)
    setup = build_training(Setting(task, lm, BUDGETS, seed=seed), rl, settings)
    test = lmgym.TokenVectorEnv(256, task=task, model=lm, split="test", kl="none", **BUDGETS)
    curve = [measured_on(setup.policy, test, 0)]
    for number, _ in enumerate(setup.train(module, settings, **extra), start=1):
        if number % 10 == 0 or number == config.updates:
            curve.append(measured_on(setup.policy, test, number))
    return curve, setup.policy


def measured_on(policy: Policy, env: lmgym.TokenVectorEnv, update: int) -> dict[str, float]:
    """Shares of right answers and of right form, and tokens of an answer as a share of the budget."""
    lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    completions = env.completions()
    return {
        "update": float(update),
        "right": float(np.mean([is_right(p, c) for p, c in zip(env.prompts, completions, strict=True)])),
        "form": float(np.mean([has_form(completion) for completion in completions])),
        "length": float(np.mean([completion.tokens for completion in completions])) / BUDGETS["max_new_tokens"],
    }


def first(curve: list[dict[str, float]], name: str) -> float:
    """The first measured update with a share of at least one half; the last one, if there is none."""
    return next((row["update"] for row in curve if row[name] >= 0.5), curve[-1]["update"])


def shown(curve: list[dict[str, float]], name: str) -> list[list[float]]:
    """One column against the update."""
    return points([row["update"] for row in curve], [row[name] for row in curve])
