"""Worlds of several ranks for tests: processes that join over gloo, as torchrun starts them, and what they run there.

The functions that ranks run are at the top level of this module, because another process finds them by name.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import lmgym
from agents import a2c, grpo, nlpo, online_dpo, ppo, reinforce, rloo
from agents.distributed import joined
from agents.learner import Learner, LearnerConfig
from lmgym import Policy, TokenVectorEnv
from lmgym.reward import AdaptiveKL
from lmgym.tasks.probe import Tree

PRELOADED = ("peft", "transformers.models.gpt2.modeling_gpt2", "worlds")


class Ended(NamedTuple):
    """How a rank ended.

    Attributes:
        result: what the function returned; None if it did not.
        error: the type and the message of the exception that ended it; empty without one.
        status: the exit status of its process, negative for a signal.
        seconds: from the start of all ranks.
    """

    result: Any
    error: str
    status: int | None
    seconds: float


def _main(
    rank: int, world: int, port: int, timeout: float, function: Callable[..., Any], given: Any, pipe: Any
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    try:
        with joined(timeout) if world > 1 else _alone():
            pipe.send((function(*given), ""))
    except BaseException as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None


def _alone() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def run_world(world: int, function: Callable[..., Any], *given: Any, timeout: float = 60.0) -> list[Ended]:
    """Runs a function of this module on every rank of a world, and returns how each ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    pipes, processes, began = [], [], time.monotonic()
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(rank, world, store.port, timeout, function, given, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    found = []
    for pipe, process in zip(pipes, processes, strict=True):
        try:
            result, error = pipe.recv() if pipe.poll(100) else (None, "no answer")
        except EOFError:
            result, error = None, ""
        process.join(10)
        found.append(Ended(result, error, process.exitcode, time.monotonic() - began))
        process.kill()
        process.join()
    return found


# What the ranks run --------------------------------------------------------------------------------------------------

ROWS = 12


class Trained(NamedTuple):
    """What a run came to.

    Attributes:
        parameters: of the trained weights.
        rows: the metrics of each update.
        tokens: the texts of the first update, as token ids; empty where nothing is sampled.
        steps: the optimizer steps of all updates.
    """

    parameters: np.ndarray
    rows: list[dict[str, float]]
    tokens: list[list[int]]


def _flat(parameters: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in parameters]).numpy()


def train(name: str, rows: int = ROWS, updates: int = 10, **settings: Any) -> Trained:
    """Trains a policy on the probe by an algorithm, with a KL controller that adapts."""
    module = {m.__name__.rpartition(".")[2]: m for m in (a2c, grpo, nlpo, online_dpo, ppo, reinforce, rloo)}[name]
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=4, alpha=8, seed=0)
    critic: Any = "head" if name in ("a2c", "nlpo", "ppo") else "none"
    policy = Policy(lm, critic=critic, seed=0, top_p=settings.pop("top_p", 1.0))
    config = module.Config(updates=updates, **settings)
    beta = AdaptiveKL(0.1, 0.05, 100.0)
    kl: Any = getattr(config, "env_kl", "sampled")
    env = TokenVectorEnv(rows, task=Tree(), model=lm, max_prompt_tokens=1, max_new_tokens=3, kl=kl, beta=beta)
    learner = Learner(policy.parameters(), LearnerConfig(lr=3e-3, warmup=0.0, micro_tokens=16), 0)
    found, tokens = [], []
    for row in module.train(policy, env, learner, config):
        found.append(row)
        tokens = tokens or [c[:n] for c, n in zip(env.tokens.tolist(), env.length.tolist(), strict=True)]
    return Trained(_flat(learner.parameters), found, tokens)
