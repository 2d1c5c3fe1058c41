"""Worlds of several ranks for tests: processes that join over gloo, as torchrun starts them, and what they run there.

The functions that ranks run are at the top level of this module, because another process finds them by name.
"""

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from types import ModuleType
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

import lmgym
from agents import a2c, dpo, grpo, nlpo, online_dpo, ppo, reinforce, reward_modelling, rloo, sft
from agents.distributed import TorchRanks, joined
from agents.learner import Learner, LearnerConfig
from agents.training import Batch
from lmgym import Policy, RolloutBuffer, Score, Stream, TokenVectorEnv, collect
from lmgym.models import Example
from lmgym.preferences import Comparison
from lmgym.ranks import current
from lmgym.reward import AdaptiveKL, RewardModel
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
        with joined(timeout) if world > 1 else nullcontext():
            pipe.send((function(*given), ""))
    except BaseException as error:
        traceback.print_exc()
        pipe.send((None, f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from None


def run_world(world: int, function: Callable[..., Any], *given: Any, timeout: float = 60.0) -> list[Ended]:
    """Runs a function of this module on every rank of a world, and returns how each ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    pipes, processes, began = [], [], time.monotonic()
    for rank in range(world):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_main, args=(rank, world, store.port, timeout, function, given, sender))
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    answers, found = [], []
    for pipe in pipes:  # of all ranks, before any is waited for: one whose answer is not read cannot end
        try:
            answers.append(pipe.recv() if pipe.poll(100) else (None, "no answer"))
        except EOFError:
            answers.append((None, ""))
    for (result, error), process in zip(answers, processes, strict=True):
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
    """

    parameters: np.ndarray
    rows: list[dict[str, float]]
    tokens: list[list[int]]


def _flat(parameters: Sequence[torch.Tensor]) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in parameters]).numpy()


def _optimizer(**settings: Any) -> LearnerConfig:
    """Passes of a few rows each, so that a rank has several."""
    return LearnerConfig(**({"warmup": 0.0, "micro_tokens": 16, "max_grad_norm": 0.1} | settings))


def sampled(module: ModuleType, rows: int = ROWS, top_p: float = 1.0, ema: float = 0.0, **settings: Any) -> Trained:
    """Trains a policy on the probe by an algorithm, with a KL controller that adapts."""
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=4, alpha=8, seed=0)
    critic: Any = "head" if module in (a2c, nlpo, ppo) else "none"
    policy = Policy(lm, critic=critic, seed=0, top_p=top_p)
    config = module.Config(**settings)
    kl: Any = getattr(config, "env_kl", "sampled")
    score = Score({"tree": Tree().score, "length": (0.1, lambda prompts, texts: [float(c.tokens) for c in texts])})
    env = TokenVectorEnv(
        rows, task=Tree(), model=lm, score=score, max_prompt_tokens=1, max_new_tokens=3, kl=kl,
        beta=AdaptiveKL(0.1, 0.05, 100.0),
    )  # fmt: skip
    learner = Learner(policy.parameters(), _optimizer(ema_decay=ema), 0)
    examples = [Example("a", "b"), Example("b", "cd"), Example("c", "da")]
    more = {"examples": examples} if settings.get("ptx_coef") else {}
    found, tokens = [], []
    for row in module.train(policy, env, learner, config, **more):
        found.append(row)
        tokens = tokens or [c[:n] for c, n in zip(env.tokens.tolist(), env.length.tolist(), strict=True)]
    learner.use_average()
    return Trained(_flat(learner.parameters), found, tokens)


def foreign(updates: int) -> Trained:
    """An algorithm that knows nothing of ranks: its own loss, given whole, beside a step's."""
    own = ModuleType("foreign")

    @dataclass(frozen=True)
    class Config:
        updates: int

    def train(policy: Policy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
        buffer = RolloutBuffer.like(env)
        for update in learner.updates(config.updates):
            rollout = collect(policy, env, buffer, Stream(learner.seed, update), slots=4)
            returns = rollout.rewards.sum(1)
            batch = Batch.of(rollout, (returns - returns.mean()) / returns.std())
            for minibatch in learner.minibatches(batch, 7):
                learner.backward(0.01 * torch.stack([(p**2).sum() for p in learner.parameters]).sum())
                learner.step(policy, minibatch, lambda new, old: -old.advantages * new.logp)
            learner.metrics.add("own/best", returns.max())
            yield learner.summarise(rollout)

    own.Config, own.train = Config, train  # pyright: ignore[reportAttributeAccessIssue]
    return sampled(own, updates=updates)


RANKINGS = [
    Comparison("a", ("b", "cdd")), Comparison("b", ("dd", "a", "ca")), Comparison("c", ("ab", "b")),
    Comparison("d", ("c", "ab", "bbb")), Comparison("a", ("d", "cc")),
]  # fmt: skip


def supervised(name: str, epochs: int) -> Trained:
    """Fine-tuning, DPO or a reward model."""
    lm = lmgym.load("probe")
    if name == "reward_modelling":
        model = RewardModel.from_language_model(lm, 0, 0, 0)
        learner = Learner(model.parameters(), _optimizer(), 0)
        config = reward_modelling.Config(epochs=epochs, minibatch_prompts=3)
        rows = list(reward_modelling.train(model, RANKINGS, RANKINGS[:2], learner, config))
        return Trained(_flat(learner.parameters), rows, [])
    if name == "sft":
        parameters = list(lm.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_(True)
        learner = Learner(parameters, _optimizer(), 0)
        examples = [Example(c.prompt, text) for c in RANKINGS for text in c.ranked]
        rows = list(sft.train(lm, examples, examples[:3], learner, sft.Config(epochs=epochs, minibatch_rows=5)))
        return Trained(_flat(parameters), rows, [])
    lm.adapters.add("policy", rank=4, alpha=8, seed=0)
    policy = Policy(lm, critic="none")
    env = TokenVectorEnv(1, task=Tree(), model=lm, max_prompt_tokens=1, max_new_tokens=3, kl="none", beta=0.1)
    learner = Learner(policy.parameters(), _optimizer(), 0)
    config = dpo.Config(epochs=epochs, minibatch_pairs=3)
    rows = list(dpo.train(policy, env, learner, config, RANKINGS))
    return Trained(_flat(learner.parameters), rows, [])


def train_all(updates: int, names: Sequence[str]) -> dict[str, Trained]:
    """Every kind of step of these names, one after the other, on the same ranks."""
    epochs = max(1, updates // 3)
    known: dict[str, Callable[[], Trained]] = {
        "ppo": lambda: sampled(
            ppo, updates=updates, minibatch_rows=5, target_kl=0.01, ptx_coef=0.1, ptx_rows=2, ema=0.5
        ),
        "one_row": lambda: sampled(ppo, rows=1, updates=2, minibatch_rows=1),
        "nlpo": lambda: sampled(nlpo, updates=2, minibatch_rows=8),
        "grpo": lambda: sampled(grpo, updates=updates, group=3, top_p=0.9),
        "rloo": lambda: sampled(rloo, updates=updates, group=4, minibatch_rows=8),
        "a2c": lambda: sampled(a2c, updates=updates),
        "online_dpo": lambda: sampled(online_dpo, updates=updates, minibatch_pairs=4),
        "foreign": lambda: foreign(updates),
        "sft": lambda: supervised("sft", epochs),
        "dpo": lambda: supervised("dpo", epochs),
        "reward_modelling": lambda: supervised("reward_modelling", epochs),
    }
    return {name: known[name]() for name in names}


def bad_step(skip: bool) -> list[str]:
    """A reward of one row that is not finite."""
    lm = lmgym.load("probe")
    lm.adapters.add("policy", rank=4, alpha=8, seed=0)
    policy = Policy(lm, critic="none")
    score = Score({"tree": lambda prompts, texts: [float("nan")] + [0.0] * (len(texts) - 1)}, finite=False)
    env = TokenVectorEnv(4, task=Tree(), model=lm, score=score, max_prompt_tokens=1, max_new_tokens=3, kl="sampled")
    before = _flat(policy.parameters())
    learner = Learner(policy.parameters(), _optimizer(), 0, on_bad_step="skip" if skip else "stop")
    try:
        (row,) = reinforce.train(policy, env, learner, reinforce.Config(updates=1, baseline="none"))
    except ArithmeticError as error:
        return [str(error)]
    unchanged = bool((_flat(policy.parameters()) == before).all())
    return [f"{row['optimizer/bad_steps']:g} {unchanged}"]


def fail(how: str) -> str:
    """Rank 1 fails, after a first exchange, while the others wait for it."""
    ranks = current()
    ranks.barrier()
    if ranks.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hung":
            time.sleep(8)
        if how == "error":
            cast("TorchRanks", ranks).fail("the score 'judge' raised KeyError")
            raise ValueError("the score 'judge' raised KeyError")
    ranks.barrier()
    return "went on"


def different_prompts() -> str:
    """A task whose prompts depend on the rank."""
    task = Tree()
    sample = task.sample
    if current().rank == 1:
        task.sample = lambda rng, split="train": lmgym.Prompt("d")  # pyright: ignore[reportAttributeAccessIssue]
    assert sample
    lm = lmgym.load("probe")
    env = TokenVectorEnv(4, task=task, model=lm, max_prompt_tokens=1, max_new_tokens=3, kl="none")
    collect(Policy(lm, None, critic="none"), env, RolloutBuffer.like(env), Stream(0, 0))
    return "went on"


def unused() -> list[float]:
    """A parameter that the loss of no rank reads, and weight decay: the optimizer must leave it alone."""
    used, not_used = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    learner = Learner([used, not_used], _optimizer(weight_decay=0.5, lr=0.1), 0)
    learner.minimise([1.0, 2.0, 3.0], lambda part: (used.sum() * sum(part)) if part else used.sum() * 0)
    return [*used.tolist(), *not_used.tolist()]


def drift() -> str:
    """A program that changes the weights of one rank alone."""
    weight = torch.nn.Parameter(torch.zeros(3))
    learner = Learner([weight], _optimizer(), 0)
    if current().rank == 1:
        weight.data[1] = 1e-7
    list(learner.updates(1))
    return "went on"
