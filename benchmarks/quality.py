"""Do the fast paths learn as well? PPO on the demo's task and models, with the same seeds, in each variant.

    python -m benchmarks.quality [--seeds 0 1 2] [--updates 28]

The table compares the regularised objective, score − β·KL, of 256 held-out prompts after training: the mean over
prompts and seeds, and its standard error over prompts. The seconds are processor time of one thread.
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
from agents.pipeline import RLOptions, Setting, build_training
from agents.runs.machine import hardware, revision
from lmgym.reward import RewardModel
from lmgym.rollout import collect
from lmgym.tasks import Sentiment

BETA = 0.08


@dataclass(frozen=True)
class Variant:
    """A way to run PPO.

    Attributes:
        fast: whether to use the fused passes.
        tricks: whether finished rows leave the batch (compaction), and rows of similar length share a pass (bucketing).
        dtype: of the weights.
        layers: LoRA on this many top layers, with the output of the others cached; 0 means all layers.
        more: multiplies the number of updates.
    """

    fast: bool = True
    tricks: bool = True
    dtype: str = "float32"
    layers: int = 0
    more: float = 1.0


VARIANTS = {
    "float32 without tricks": Variant(fast=False, tricks=False),
    "float32": Variant(),
    "bfloat16": Variant(dtype="bfloat16"),
    "top 2 layers, the rest cached": Variant(layers=2),
    "top 2 layers, for as long as float32": Variant(layers=2, more=1.8),
}


def objective(variant: Variant, seed: int, updates: int) -> tuple[float, float, float]:
    """The mean of score − β·KL after training, its standard error over prompts, and the seconds of the training."""
    lm = lmgym.load("tiny", dtype=variant.dtype)
    lm.fast = variant.fast
    lm.adapters.add("policy", seed=seed, layers=variant.layers)
    setting = Setting(Sentiment(scorer=RewardModel.load("tiny-reward")), lm, {"max_prompt_tokens": 40}, seed=seed)
    micro_tokens = 0 if variant.tricks else 10**6
    rl = RLOptions(lr=2e-3, rows=64, critic="head", beta=BETA, bucket=variant.tricks, micro_tokens=micro_tokens)
    config = ppo.Config(updates=round(updates * variant.more))
    setup = build_training(setting, rl, config, policy=lmgym.Policy(lm, seed=seed))
    ppo.collect = partial(collect, compact=variant.tricks)
    began = time.process_time()
    for _ in setup.train(ppo, config):
        pass
    spent = time.process_time() - began
    env = setup.evaluation_env(256)
    buffer = collect(setup.policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(1000 + seed, 0))
    paid = buffer.rewards.sum(1)
    return float(paid.mean()), float(paid.std() / len(paid) ** 0.5), spent


def main() -> None:
    """Runs every variant with every seed and prints a table."""
    parser = argparse.ArgumentParser(description="Do the fast paths learn as well?")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=28)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console, table = Console(), Table("variant", *(f"seed {s}" for s in options.seeds), "mean", "± se", "seconds")
    for name, variant in VARIANTS.items():
        found = [objective(variant, seed, options.updates) for seed in options.seeds]
        means, errors, seconds = zip(*found, strict=True)
        error = sum(e * e for e in errors) ** 0.5 / len(errors)
        figures = (*means, statistics.mean(means), error)
        table.add_row(name, *(f"{x:.3f}" for x in figures), f"{statistics.mean(seconds):.1f}")
        console.print(name, [f"{m:.3f} ± {e:.3f}" for m, e in zip(means, errors, strict=True)], highlight=False)
    console.print(f"{options.updates} updates of 64 rows, β = {BETA}, {hardware()}, revision {revision()}")
    console.print(table)


if __name__ == "__main__":
    main()
