"""Advantage actor-critic (Mnih et al. 2016), synchronous: one step for policy and critic from each rollout.

What differs from the paper: whole completions instead of a few steps of each environment, so that nothing is
bootstrapped unless the task cuts completions off; generalised advantages (λ = 1 is the paper's); Adam, not RMSProp.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents import learner as common
from agents.learner import Batch, Learner
from agents.training import require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect

DEFAULTS = {"critic": "head"}
"""What `lmgym train` sets for this algorithm, where the user says nothing."""


@dataclass(frozen=True)
class Config:
    """A2C's own settings."""

    updates: int = 100
    """Rollouts, each followed by one optimizer step."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 1.0
    """GAE's λ."""
    value_coef: float = 0.5
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token in nats; the paper has 0.01."""


METRICS = common.METRICS | {
    "value/loss": "½ (V − R)², mean over tokens",
    "value/explained_variance": "1 − Var(return − value) / Var(return)",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.critic(policy, "a2c")
    require.kl(policy, env, "a2c")
    buffer, metrics = RolloutBuffer.like(env), learner.metrics
    for update in learner.updates(config.updates):
        learner.schedule(update / config.updates)

        # Prompts -> tokens -> scores.
        collect(policy, env, buffer, Stream(learner.seed, update))

        # Scores -> rewards -> advantages.
        advantages, returns = F.gae(
            buffer.rewards, buffer.values, buffer.is_action, buffer.bootstrap, config.gamma, config.lam
        )
        metrics.add("value/explained_variance", F.explained_variance(buffer.values, returns, buffer.is_action))

        # Advantages -> steps.
        def loss(new: Evaluation, old: Batch) -> Tensor:
            value_loss = (new.value - old.returns).square() / 2
            metrics.add("value/loss", value_loss, old.mask)
            return config.value_coef * value_loss - old.advantages * new.logp - config.entropy_coef * new.entropy

        learner.fit(policy, Batch.of(buffer, advantages, returns), loss, weigh=F.sequence_sum)
        yield learner.summarise(buffer, env)
