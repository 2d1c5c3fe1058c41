"""A million steps: nothing grows, nothing slows down."""

import gc
import time

import numpy as np
import psutil
import pytest
import torch

import lmgym
from lmgym import TokenVectorEnv
from lmgym.tasks.probe import Tree

pytestmark = [pytest.mark.stress, pytest.mark.timeout(300)]

ROWS, MILLION = 4096, 1_000_000


def memory() -> tuple[int, int]:
    """Bytes that the process holds, and how many objects Python's collector knows."""
    gc.collect()
    return psutil.Process().memory_info().rss, len(gc.get_objects())


@pytest.mark.parametrize("mode", ["SameStep"])
def test_a_million_steps_of_an_environment(mode: str) -> None:
    """Rows end, restart and are followed by the reference throughout."""
    env = TokenVectorEnv(
        ROWS, task=Tree(), model=lmgym.load("probe"), max_prompt_tokens=1, max_new_tokens=3, autoreset_mode=mode
    )
    env.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    steps, ended, early, took = -(-MILLION // ROWS), 0, (0, 0), []
    for step in range(steps):
        began = time.process_time()
        _, rewards, terminated, _, _ = env.step(torch.randint(1, 6, (ROWS,), generator=generator))
        took.append(time.process_time() - began)
        ended += int(terminated.sum())
        assert bool(torch.isfinite(rewards).all())
        if step == steps // 10:
            early = memory()
    late = memory()
    print(f"\n{steps * ROWS} steps, {ended} episodes; RSS {early[0] / 2**20:.0f} → {late[0] / 2**20:.0f} MB, "
          f"objects {early[1]} → {late[1]}")  # fmt: skip
    assert ended > MILLION // 4
    assert late[1] < early[1] + 1000, "objects pile up"
    assert late[0] < early[0] + 48 * 2**20, "memory grows"
    assert np.median(took[-20:]) < 2 * np.median(took[5:25]) + 0.02, "steps get slower"


def test_small_steps_with_ever_new_prompts() -> None:
    """Where what is kept per call would show: few rows, many calls, prompts that are new each time."""
    env = TokenVectorEnv(2, task=Tree(), model=lmgym.load("probe"), max_prompt_tokens=8, max_new_tokens=3)
    rng, early = np.random.default_rng(0), (0, 0)
    for number in range(2000):
        if number % 4 == 0:
            prompt = "".join(rng.choice(list("abcd"), size=8))
            env.reset(seed=number, options={"prompt": prompt})
        env.step(torch.from_numpy(rng.integers(2, 6, size=2)))
        if number == 500:
            early = memory()
    late = memory()
    # The model remembers how prompts are tokenised, 65,536 of them at most: a tuple each.
    assert late[1] < early[1] + 1000
    assert late[0] < early[0] + 32 * 2**20
