"""Whether what is fast learns as well: PPO on the demo's task and models, with the same seeds, by each setting.

    python -m benchmarks.quality [--seeds 0 1 2] [--updates 28]

What is compared is the regularised objective, score − β·KL, of 256 held-out prompts after training: the mean over
prompts and seeds, and its standard error over prompts. Each setting's seconds are of one thread.
"""

import argparse
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from agents.runs.machine import hardware, revision
from lmgym.reward import RewardModel
from lmgym.rollout import collect
from lmgym.tasks import Sentiment

BETA = 0.08


@dataclass(frozen=True)
class Setting:
    """A way to run PPO.

    Attributes:
        fast: whether passes are fused.
        tricks: whether rows leave, and rows of similar length go through the model together.
        dtype: of the weights.
        layers: LoRA on this many top layers, the rest cached; 0 on all.
        more: this many times the updates.
    """

    fast: bool = True
    tricks: bool = True
    dtype: str = "float32"
    layers: int = 0
    more: float = 1.0


SETTINGS = {
    "float32 without tricks": Setting(fast=False, tricks=False),
    "float32": Setting(),
    "bfloat16": Setting(dtype="bfloat16"),
    "top 2 layers, the rest cached": Setting(layers=2),
    "top 2 layers, for as long as float32": Setting(layers=2, more=1.8),
}


def objective(setting: Setting, seed: int, updates: int) -> tuple[float, float, float]:
    """The mean of score − β·KL after training, its standard error over prompts, and the seconds of the training."""
    lm = lmgym.load("tiny", dtype=setting.dtype)
    lm.fast = setting.fast
    lm.adapters.add("policy", seed=seed, layers=setting.layers)
    policy = lmgym.Policy(lm, seed=seed)
    task = Sentiment(scorer=RewardModel.load("tiny-reward"))
    make = partial(lmgym.TokenVectorEnv, task=task, model=lm, max_prompt_tokens=40, kl="sampled", beta=BETA)
    config = LearnerConfig(lr=2e-3, bucket=setting.tricks, micro_tokens=0 if setting.tricks else 10**6)
    learner = Learner(policy.parameters(), config, seed)
    ppo.collect = partial(collect, compact=setting.tricks)
    began = time.process_time()
    for _ in ppo.train(policy, make(64), learner, ppo.Config(updates=round(updates * setting.more))):
        pass
    spent = time.process_time() - began
    env = make(256, split="test")
    buffer = collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(1000 + seed, 0))
    paid = buffer.rewards.sum(1)
    return float(paid.mean()), float(paid.std() / len(paid) ** 0.5), spent


def main() -> None:
    """Runs every setting with every seed and prints a table."""
    parser = argparse.ArgumentParser(description="Does what is fast learn as well?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=28)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, table = Console(), Table("setting", *(f"seed {s}" for s in options.seeds), "mean", "± se", "seconds")
    for name, setting in SETTINGS.items():
        found = [objective(setting, seed, options.updates) for seed in options.seeds]
        means, errors, seconds = zip(*found, strict=True)
        error = sum(e * e for e in errors) ** 0.5 / len(errors)
        figures = (*means, statistics.mean(means), error)
        table.add_row(name, *(f"{x:.3f}" for x in figures), f"{statistics.mean(seconds):.1f}")
        console.print(name, [f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True)], highlight=False)
    console.print(f"{options.updates} updates of 64 rows, β = {BETA}, {hardware()}, revision {revision()}")
    console.print(table)


if __name__ == "__main__":
    main()
