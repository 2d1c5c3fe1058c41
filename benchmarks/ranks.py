"""How much faster two ranks are than one process, and how much of the time they exchange: PPO at a shape, interleaved.

    python -m benchmarks.ranks --shape S --updates 6
    python -m benchmarks.ranks --shape S --exchanges      # the exchanges of an update alone, for a busy machine

The ceiling is the share of the speed that two processes keep which know nothing of each other and run the whole update
at the same time: what the cores and the memory that they share allow.

On a busy machine the times of two ranks tell nothing: each waits for the other, and both for a core. The exchanges
alone need little of a core.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from benchmarks import shapes
from lmgym.ranks import current, gather_data

ROWS, TOKENS, MINIBATCH = 64, 48, 16


def world(folder: str) -> tuple[Any, Any, Any]:
    """A policy, an environment and a learner."""
    lm = lmgym.load(folder)
    lm.adapters.add("policy", rank=8, alpha=16, seed=0)
    policy = lmgym.Policy(lm, critic="head")
    task = lmgym.registry.make_task(lmgym.registry.find_spec("Sort"))
    budgets: Any = {"max_prompt_tokens": 32, "max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    prompt = lmgym.Prompt("", token_ids=tuple(range(5, 37)))
    task.sample = lambda rng, split="train": prompt  # pyright: ignore[reportAttributeAccessIssue]
    env = lmgym.TokenVectorEnv(ROWS, task=task, model=lm, score=lambda p, c: [0.0] * len(c), kl="sampled", **budgets)
    return policy, env, Learner(policy.parameters(), LearnerConfig(), 0)


def updates(folder: str, count: int) -> list[float]:
    """Seconds of each update, without the first."""
    policy, env, learner = world(folder)
    found, began = [], time.perf_counter()
    for _ in ppo.train(policy, env, learner, ppo.Config(updates=count + 1, minibatch_rows=MINIBATCH)):
        found.append(time.perf_counter() - began)
        began = time.perf_counter()
    return found[1:]


def exchanges(folder: str, count: int) -> list[float]:
    """Seconds of the exchanges of an update, without the work between them."""
    _, _, learner = world(folder)
    ranks, config, found = current(), ppo.Config(), []
    trained = [torch.zeros_like(p) for p in learner.parameters]
    size = sum(p.numel() for p in trained)
    steps = config.epochs * -(-ROWS // MINIBATCH)
    row = torch.zeros(ROWS // ranks.world, TOKENS * (8 + 5 * 4 + 1) + 64, dtype=torch.uint8)
    for _ in range(count):
        ranks.barrier()
        began = time.perf_counter()
        gather_data("x" * 64)
        ranks.gather(row, [len(row)] * ranks.world)
        for _ in range(steps):
            ranks.sum(torch.ones(len(trained), dtype=torch.int32))
            ranks.sum(torch.zeros(size))
        for _ in range(config.epochs + 1):
            gather_data({f"policy/metric_{i}": [0.123456789, 1000] for i in range(8)})
        ranks.sum(torch.zeros(4, dtype=torch.int32))
        found.append(time.perf_counter() - began)
    return found


def main() -> int:
    """Measures one process and two ranks in turns."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from worlds import run_world  # pyright: ignore[reportMissingImports]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S", choices=list(shapes.SHAPES))
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--exchanges", action="store_true")
    options = parser.parse_args()
    folder = str(shapes.make(options.shape, Path(__file__).resolve().parents[1] / ".bench" / "shapes") / "policy")
    alone: list[float] = []
    pair: list[float] = []
    strangers: list[float] = []
    for _ in range(options.rounds):
        alone += run_world(1, updates, folder, options.updates)[0].result
        pair += run_world(2, exchanges if options.exchanges else updates, folder, options.updates)[0].result
        if not options.exchanges:
            with ThreadPoolExecutor() as pool:
                both = [pool.submit(run_world, 1, updates, folder, options.updates) for _ in range(2)]
            strangers += [seconds for one in both for seconds in one.result()[0].result]
    one, two = median(alone), median(pair)
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    if options.exchanges:
        print(f"{options.shape}: update {one:.3f} s, exchanges {two * 1000:.1f} ms, {two / one:.1%} of it ({load})")
    else:
        print(
            f"{options.shape}: one process {one:.3f} s, two ranks {two:.3f} s, efficiency {one / two / 2:.0%}, ceiling "
            f"{one / median(strangers):.0%} ({load})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
