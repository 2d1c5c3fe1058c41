"""lmgym as a contender: rollouts, PPO, GRPO."""

import sys
from collections.abc import Callable, Sequence
from functools import partial, partialmethod
from typing import Any

import numpy as np
from torch import Tensor

import lmgym
from agents import grpo, ppo
from agents.learner import Learner, LearnerConfig
from benchmarks.worker import BETA, LR, Job, Turn
from lmgym.models import Sequences
from lmgym.reward import RewardModel
from lmgym.rollout import decode
from lmgym.tasks.base import Completion, Prompt, Split, Task

FOREVER = 10**6


class Prompts(Task):
    """The prompts that all contenders continue. Its score is not used: the environment has its own."""

    name = "prompts"
    has_gold = False

    def __init__(self, texts: list[str]):
        self.texts = texts

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return Prompt(self.texts[rng.integers(len(self.texts))])

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return [0.0] * len(completions)


def build(job: Job) -> lmgym.Policy:
    """Makes a job's policy."""
    lm = lmgym.load(job.part("policy"), device=job.device, dtype=job.dtype)
    if "layers" in job.options:
        lm.adapters.add("policy", rank=8, alpha=16, targets="attention", layers=job.options["layers"])
    else:
        lm.adapters.load(job.part("adapter"), "policy")
    return lmgym.Policy(lm, critic=job.options.get("critic", "none"))


def environment(job: Job, lm: lmgym.LanguageModel, rows: int, new_tokens: int) -> lmgym.TokenVectorEnv:
    """Makes a job's environment; the reward model gives the score, in the dtype that the peers use for theirs."""
    reward = RewardModel.load(job.part("reward"), device=job.device)
    reward.model.to(dtype=job.torch_dtype)
    prompts = job.prompts()
    return lmgym.TokenVectorEnv(
        rows,
        task=Prompts([lm.text.decode(ids) for ids in prompts]),
        model=lm,
        score=reward,
        kl=job.options.get("kl", "sampled"),
        beta=BETA,
        max_prompt_tokens=len(prompts[0]),
        max_new_tokens=new_tokens,
    )


class Clock:
    """Adds up the seconds that chosen functions take."""

    def __init__(self, turn: Turn):
        self.turn = turn
        self.phases: dict[str, float] = {}

    def watch(self, owner: Any, name: str, phase: str, after: Callable[[Any], None] = lambda result: None) -> None:
        """Times a function of a module, or a method of an object, from now on."""
        function = getattr(owner, name)

        def call(*args: Any, **more: Any) -> Any:
            began = self.turn.clock()
            result = function(*args, **more)
            self.phases[phase] = self.phases.get(phase, 0.0) + self.turn.clock() - began
            after(result)
            return result

        setattr(owner, name, call)

    def take(self) -> dict[str, float]:
        """Returns the sums and resets them to 0."""
        phases, self.phases = self.phases, {}
        return phases


def outputs(buffer: lmgym.RolloutBuffer) -> dict[str, Tensor]:
    """The tensors that are checked."""
    names = ("tokens", "is_action", "logp", "reference_logp", "score")
    return {"prompts": buffer.prompt_ids} | {name: getattr(buffer, name) for name in names}


def rollout(turn: Turn, job: Job) -> None:
    """One rollout per turn, without score and reference, because `generate` does not compute these either."""
    policy = build(job)
    env = environment(job, policy.lm, job.rows, job.new_tokens)
    buffer = lmgym.RolloutBuffer.like(env)
    clock = Clock(turn)
    for method in ("reset", "prompt_block", "append", "running_rows"):
        clock.watch(env, method, "environment")
    turn.ready()
    for update in range(FOREVER):
        decode(policy, env, buffer, lmgym.Stream(0, update), compact=not job.options.get("plain"))
        sequences = env.sequences()
        found = {
            "prompts": sequences.prompt_ids,
            "tokens": sequences.tokens,
            "is_action": sequences.is_action,
            "logp": buffer.logp,
        }
        turn.done(clock.take(), partial(dict, found))


def sweep(turn: Turn, job: Job) -> None:
    """One rollout of each size per turn; the seconds of each size are a phase."""
    policy = build(job)
    envs = {
        str(value): environment(job, policy.lm, **({"rows": job.rows, "new_tokens": job.new_tokens} | {over: value}))
        for over in [{"rows": "rows", "tokens": "new_tokens"}[job.options["over"]]]
        for value in job.options["values"]
    }
    buffers = {size: lmgym.RolloutBuffer.like(env) for size, env in envs.items()}
    turn.ready()
    for update in range(FOREVER):
        phases = {}
        for size, env in envs.items():
            began = turn.clock()
            decode(policy, env, buffers[size], lmgym.Stream(0, update))
            phases[size] = turn.clock() - began
        turn.done(phases)


def train(turn: Turn, job: Job, module: Any, config: Any) -> None:
    """One iteration per turn."""
    policy = build(job)
    env = environment(job, policy.lm, job.rows, job.new_tokens)
    plain = bool(job.options.get("plain"))  # neither compaction nor bucketing
    config_of_learner = LearnerConfig(lr=LR, schedule="constant", warmup=0.0, bucket=not plain)
    learner = Learner(policy.parameters(), config_of_learner)
    clock, seen = Clock(turn), {}
    if plain:
        module.collect = partial(module.collect, compact=False)
        Sequences.buckets = partialmethod(Sequences.buckets, by_length=False)  # pyright: ignore
    clock.watch(module, "collect", "collect", lambda buffer: seen.update(outputs(buffer)))
    updates = module.train(policy, env, learner, config)
    turn.ready()
    for _ in updates:
        turn.done(clock.take(), lambda: seen)


def main() -> None:
    """Runs the work that the first command-line argument names."""
    turn = Turn()
    job = turn.job()
    match sys.argv[1]:
        case "rollout":
            rollout(turn, job)
        case "sweep":
            sweep(turn, job)
        case "ppo":  # all epochs, as TRL does: no early stop
            train(turn, job, ppo, ppo.Config(FOREVER, job.epochs, job.rows, target_kl=0.0))
        case "grpo":
            train(turn, job, grpo, grpo.Config(FOREVER, job.options["group"], job.epochs))


if __name__ == "__main__":
    main()
