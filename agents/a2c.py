"""Advantage actor-critic, A2C (Mnih et al. 2016, https://arxiv.org/abs/1602.01783): one step after each rollout.

Policy and critic are updated together. What differs from the paper: the method is synchronous; a rollout holds whole
completions, not a few steps of each environment, so a return is bootstrapped only if the task truncates a completion;
advantages come from generalised advantage estimation (λ = 1 gives the paper's); the optimizer is Adam, not RMSProp.
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

DEFAULTS = {"critic": "head"}
"""Defaults of `lmgym train` for this algorithm; the user's options override them."""

PRESETS = {"tuned": {"rows": 32, "updates": 200}}
"""What `--preset NAME` sets; docs/tuning.md says how these were found."""


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
    """Weight of the entropy bonus, per token in nats; 0.01 in the paper."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", "value_coef", least=0)
        require.in_range(self, "gamma", "lam", least=0, most=1)
        require.in_range(self, "entropy_coef")


METRICS = LEARNER_METRICS | {
    "value/loss": "½ (V − R)², mean over tokens",
    "value/explained_variance": "1 − Var(return − value) / Var(return)",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.critic(policy, "a2c")
    require.kl(policy, env, "a2c")
    buffer, metrics = RolloutBuffer.like(env), learner.metrics

    def loss(new: Evaluation, old: Batch) -> Tensor:
        value_loss = (new.value - old.returns).square() / 2
        metrics.add("value/loss", value_loss, old.mask)
        return config.value_coef * value_loss - old.advantages * new.logp - config.entropy_coef * new.entropy

    for update in learner.updates(config.updates):
        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update))
        values, mask = rollout.values, rollout.is_action

        # Scores -> rewards -> advantages.
        advantages, returns = F.gae(rollout.rewards, values, mask, rollout.bootstrap, config.gamma, config.lam)
        metrics.add("value/explained_variance", F.explained_variance(values, returns, mask))

        # Advantages -> one step for policy and critic.
        for minibatch in learner.minibatches(Batch.of(rollout, advantages, returns), 0):
            learner.step(policy, minibatch, loss, weigh=F.sequence_sum)

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
