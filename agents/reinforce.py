"""REINFORCE (Williams 1992) for language models: make more probable what turned out better than the baseline.

What differs from the paper: a batch of whole completions is one step; a token is credited with what comes after it
alone; the baseline, where there is one, is the batch's mean return (its own share in which shrinks the gradient a
little, by about 1/B).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from agents import functional as F
from agents import learner as common
from agents.learner import Batch, Learner
from agents.training import require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect


@dataclass(frozen=True)
class Config:
    """REINFORCE's own settings."""

    updates: int = 100
    """Rollouts, each followed by one optimizer step."""
    gamma: float = 1.0
    """Discount."""
    baseline: Literal["none", "mean"] = "mean"
    """What is taken off the returns: nothing, or the mean return of all tokens of the rollout."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token in nats."""

    def __post_init__(self) -> None:
        require.one_of("baseline", self.baseline, ("none", "mean"))


METRICS = common.METRICS | {
    "policy/advantage_std": "standard deviation of return − baseline over tokens",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "reinforce")
    buffer = RolloutBuffer.like(env)
    for update in learner.updates(config.updates):
        learner.schedule(update / config.updates)

        # Prompts -> tokens -> scores.
        collect(policy, env, buffer, Stream(learner.seed, update))

        # Scores -> rewards -> advantages.
        advantages = F.reward_to_go(buffer.rewards, buffer.is_action, buffer.bootstrap, config.gamma)
        if config.baseline == "mean":
            advantages = advantages - F.masked_mean(advantages, buffer.is_action)
        learner.metrics.add("policy/advantage_std", advantages[buffer.is_action].std())

        # Advantages -> steps.
        def loss(new: Evaluation, old: Batch) -> Tensor:
            return -old.advantages * new.logp - config.entropy_coef * new.entropy

        learner.fit(policy, Batch.of(buffer, advantages), loss, weigh=F.sequence_sum)
        yield learner.summarise(buffer, env)
