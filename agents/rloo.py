"""REINFORCE leave-one-out, RLOO (Kool et al. 2019; Ahmadian et al. 2024).

The baseline of a completion is the mean return of the other completions of its prompt. The whole completion is one
action: its return, KL included, is credited to all its tokens. What differs from the papers: a rollout may be split
into minibatches; actions of an older policy are then weighted by the probability ratio.

Papers: https://openreview.net/forum?id=r1lgTGL5DE (Kool et al.), https://arxiv.org/abs/2402.14740 (Ahmadian et al.).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents.learner import METRICS as LEARNER_METRICS
from agents.learner import Learner
from agents.training import Batch, require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect


@dataclass(frozen=True)
class Config:
    """RLOO's own settings."""

    updates: int = 100
    """Rollouts."""
    group: int = 4
    """Completions of each prompt; the baseline of one is the mean return of the others."""
    epochs: int = 1
    """Passes over a rollout."""
    minibatch_rows: int = 0
    """Completions per optimizer step; 0 for the whole rollout."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token in nats."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", "minibatch_rows", least=0)
        require.in_range(self, "epochs", least=1)
        require.in_range(self, "entropy_coef")


METRICS = LEARNER_METRICS | {"policy/advantage_std": "standard deviation of return − baseline over rows"}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "rloo")
    require.groups(env.num_envs, config.group, "rloo")
    buffer = RolloutBuffer.like(env)

    def loss(new: Evaluation, old: Batch) -> Tensor:
        return F.surrogate(new.logp, old.logp, old.advantages) - config.entropy_coef * new.entropy

    for update in learner.updates(config.updates):
        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update, config.group))

        # Scores -> rewards -> advantages.
        advantages = F.leave_one_out(rollout.rewards.sum(1), config.group)
        learner.metrics.add("policy/advantage_std", advantages.std())

        # Advantages -> steps.
        batch = Batch.of(rollout, advantages)
        for _ in range(config.epochs):
            for minibatch in learner.minibatches(batch, config.minibatch_rows):
                learner.step(policy, minibatch, loss, weigh=F.sequence_sum)

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
