"""DeepSeek-R1: reasoning by reinforcement learning on rules alone (DeepSeek-AI 2025).

The list of works that asked for this study names a course video about the paper. R1-Zero starts GRPO from a pretrained
model without fine-tuning, and pays only rules: is the answer right, and has it the right form? The authors use no
reward model, because a policy would exploit it. Answers become longer during training. The reference is replaced by the
latest policy from time to time. Distilling the large model that RL has trained into a small one beats RL on the small
one.

What differs here: the task is to write the letter that follows the last one of a prompt of two letters. The model has
19,000 random parameters and has learned nothing before, so that RL finds the first right answer by chance. There is
nothing to reason about: answers have no cause to grow. The rules are the same two, and a right form is paid a fifth of
a right answer. The reference is replaced under a β of 0.3, 300 times the paper's, because the paper's β does not hold
so short a run back. The student is the same model without its second layer; RL and distillation are compared at the
same number of sampled tokens (for distillation, the teacher's). Tests are on samples of the same 16 prompts. In a first
trial the task was to write both letters in the opposite order; GRPO then learned the form, but few right answers in 60
updates. So the task was made easier, and the learning rate falls to 0 instead of being constant. The run of this
package on a real model of 135 million parameters is in docs/real_models.md.
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
    Claim("growth", "answers become longer during training: tokens at the end less tokens at the start", low=0.0),
    Claim("rloo_less_grpo", "RLOO is within 5 points of GRPO", -0.05, 0.05),
    Claim("ppo_less_grpo", "and PPO", -0.05, 0.05),
    Claim("refreshed_less_fixed", "under a strong KL penalty, a reference that is replaced twice by the latest policy "
          "gives more right answers than a fixed one", low=0.0),
    Claim("distilled_less_rl", "distilling the teacher into a half-size student beats RL on the student at equal "
          "tokens", low=0.0),
)  # fmt: skip
PANELS = (
    Panel("algorithms", "From rules alone", "update", "share of right answers"),
    Panel("rules", "GRPO", "update", "share; length: tokens / 4"),
    Panel("reference", "GRPO with a strong KL penalty", "update", "share of right answers"),
    Panel("student", "The student of half the size", "thousand tokens", "share of right answers"),
)
BUDGETS: dict[str, Any] = {"max_prompt_tokens": 2, "max_new_tokens": 4}
LETTERS = "abcd"
STRONG = 0.3
"""β of the comparison of references, in score per nat."""

Curve = list[dict[str, float]]


@dataclass(frozen=True)
class Config:
    """Sizes of the study."""

    seeds: int = 20
    """Independent runs."""
    updates: int = 60
    """Updates of each run."""
    rows: int = 128
    """Completions per update."""
    lr: float = 1e-2
    """Peak learning rate."""


QUICK = Config(seeds=5, updates=45, rows=96)
SMOKE = Config(seeds=3, updates=3, rows=32)


class Following(Task):
    """Write the letter that follows the prompt's last one, and end: 1 if right, and 0.2 for any one letter."""

    name = "following"
    best = 1.2

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return Prompt("".join(LETTERS[i] for i in rng.integers(4, size=2)))

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return [is_right(p, c) + 0.2 * has_form(c) for p, c in zip(prompts, completions, strict=True)]


def is_right(prompt: Prompt, completion: Completion) -> bool:
    """The rule for the answer: b after a, …, a after d."""
    return has_form(completion) and completion.text == LETTERS[LETTERS.index(prompt.text[-1]) - 3]


def has_form(completion: Completion) -> bool:
    """The rule for the form: one letter, and the end."""
    return completion.finish_reason == "stop" and len(completion.text) == 1


def run(config: Config, seed: int) -> dict[str, Any]:
    """Measures of three algorithms, of two references, and of a student that learns in two ways."""
    seed %= 2**31
    curves, teacher = {}, None
    for name, module in (("GRPO", grpo), ("RLOO", rloo), ("PPO", ppo)):
        curves[name], policy = train(config, module, lmgym.load("probe"), seed)
        teacher = teacher or policy
    references = {
        "fixed": train(config, grpo, lmgym.load("probe"), seed, beta=STRONG)[0],
        "replaced twice": train(config, grpo, lmgym.load("probe"), seed, beta=STRONG, parts=3)[0],
    }
    students = {
        "RL": train(config, grpo, half(lmgym.load("probe")), seed)[0],
        "distilled": train(config, distill, half(lmgym.load("probe")), seed, teacher=teacher)[0],
    }
    found, tokens = curves["GRPO"], min(curve[-1]["tokens"] for curve in students.values())
    ends = {name: curve[-1]["right"] for name, curve in (curves | references).items()}
    measures = {
        "grpo": ends["GRPO"],
        "start": found[0]["right"],
        "format_first": float(first(found, "right") - first(found, "form")),
        "growth": (found[-1]["length"] - found[0]["length"]) * BUDGETS["max_new_tokens"],
        "rloo_less_grpo": ends["RLOO"] - ends["GRPO"],
        "ppo_less_grpo": ends["PPO"] - ends["GRPO"],
        "refreshed_less_fixed": ends["replaced twice"] - ends["fixed"],
        "distilled_less_rl": at_tokens(students["distilled"], tokens) - at_tokens(students["RL"], tokens),
    }
    return {
        "measures": measures,
        "curves": {
            "algorithms": {name: shown(curve, "right") for name, curve in curves.items()},
            "rules": {name: shown(found, name) for name in ("right", "form", "length")},
            "reference": {name: shown(curve, "right") for name, curve in references.items()},
            "student": {name: shown(curve, "right", "tokens", 1e-3) for name, curve in students.items()},
        },
    }


def half(lm: lmgym.LanguageModel) -> lmgym.LanguageModel:
    """The model without its second layer."""
    lm.model.transformer.h = lm.model.transformer.h[:1]
    lm.model.config.n_layer = 1
    return lmgym.LanguageModel(lm.model, lm.tokenizer, "half of the probe")


def settings_of(module: ModuleType, config: Config, updates: int) -> Any:
    """The algorithm's own settings."""
    if module is ppo:
        return ppo.Config(updates, minibatch_rows=config.rows // 2)
    return distill.Config(updates) if module is distill else module.Config(updates, group=16)


def train(
    config: Config, module: ModuleType, lm: lmgym.LanguageModel, seed: int, beta: float = 0.001, parts: int = 1,
    **extra: Any,
) -> tuple[Curve, Policy]:  # fmt: skip
    """One algorithm on the rules; every fifth update, what the policy does on 256 prompts. Returns also the policy.

    Args:
        config: sizes.
        module: the algorithm.
        lm: the model, which is changed if there are several parts.
        seed: of adapter, prompts and samples.
        beta: of the KL to the reference.
        parts: after each of these parts but the last, the policy becomes the reference.
        **extra: further arguments of the algorithm.
    """
    critic = "head" if module is ppo else "none"
    rl = RLOptions(lr=config.lr, rows=config.rows, lora_rank=16, critic=critic, beta=beta)
    settings = settings_of(module, config, config.updates // parts)
    curve: Curve = []
    for part in range(parts):
        if part:
            lm.adapters.merge()
        setup = build_training(Setting(Following(), lm, BUDGETS, seed=seed + part), rl, settings)
        test = lmgym.TokenVectorEnv(256, task=Following(), model=lm, split="test", kl="none", **BUDGETS)
        curve = curve or [measured_on(setup.policy, test, 0, 0.0)]
        tokens, done = curve[-1]["tokens"], part * settings.updates
        for number, row in enumerate(setup.train(module, settings, **extra), start=done + 1):
            tokens += row["tokens/mean"] * config.rows
            if number % 5 == 0 or number == done + settings.updates:
                curve.append(measured_on(setup.policy, test, number, tokens))
    return curve, setup.policy  # pyright: ignore[reportPossiblyUnboundVariable] (there is at least one part)


def measured_on(policy: Policy, env: lmgym.TokenVectorEnv, update: int, tokens: float) -> dict[str, float]:
    """Shares of right answers and of right form, and tokens of an answer as a share of the budget."""
    lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    completions = env.completions()
    return {
        "update": float(update),
        "tokens": tokens,
        "right": float(np.mean([is_right(p, c) for p, c in zip(env.prompts, completions, strict=True)])),
        "form": float(np.mean([has_form(completion) for completion in completions])),
        "length": float(np.mean([completion.tokens for completion in completions])) / BUDGETS["max_new_tokens"],
    }


def first(curve: Curve, name: str) -> float:
    """The first measured update with a share of at least one half; the last one, if there is none."""
    return next((row["update"] for row in curve if row[name] >= 0.5), curve[-1]["update"])


def at_tokens(curve: Curve, tokens: float) -> float:
    """The share of right answers when at most so many tokens were sampled."""
    return [row["right"] for row in curve if row["tokens"] <= tokens][-1]


def shown(curve: Curve, name: str, x: str = "update", scale: float = 1.0) -> list[list[float]]:
    """One column against another."""
    return points([row[x] * scale for row in curve], [row[name] for row in curve])
