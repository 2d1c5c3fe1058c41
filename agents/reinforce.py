"""REINFORCE (Williams 1992, https://doi.org/10.1007/BF00992696): a policy gradient with a mean baseline.

What differs from the paper: one step uses a batch of whole completions; a token is credited only with the rewards from
it on; the baseline, if any, is the batch's mean return. A return is part of its own baseline, which shrinks the
gradient slightly, by a factor of about 1 − 1/B.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from agents import functional as F
from agents.learner import METRICS as LEARNER_METRICS
from agents.learner import Learner
from agents.training import Batch, require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect

PRESETS = {"tuned": {"rows": 32, "updates": 200}}
"""What `--preset NAME` sets; docs/tuning.md says how these were found."""


@dataclass(frozen=True)
class Config:
    """REINFORCE's own settings."""

    updates: int = 100
    """Rollouts, each followed by one optimizer step."""
    gamma: float = 1.0
    """Discount."""
    baseline: Literal["none", "mean"] = "mean"
    """Baseline that is subtracted from the returns: none, or the mean return over all tokens of the rollout."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token in nats."""

    def __post_init__(self) -> None:
        require.one_of("baseline", self.baseline, ("none", "mean"))
        require.in_range(self, "updates", least=0)
        require.in_range(self, "gamma", least=0, most=1)
        require.in_range(self, "entropy_coef")


METRICS = LEARNER_METRICS | {
    "policy/advantage_std": "standard deviation of return − baseline over tokens",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "reinforce")
    buffer = RolloutBuffer.like(env)

    def loss(new: Evaluation, old: Batch) -> Tensor:
        return -old.advantages * new.logp - config.entropy_coef * new.entropy

    for update in learner.updates(config.updates):
        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update))

        # Scores -> rewards -> advantages.
        advantages = F.reward_to_go(rollout.rewards, rollout.is_action, rollout.bootstrap, config.gamma)
        if config.baseline == "mean":
            advantages = advantages - F.masked_mean(advantages, rollout.is_action)
        learner.metrics.add("policy/advantage_std", advantages[rollout.is_action].std())

        # Advantages -> one step.
        for minibatch in learner.minibatches(Batch.of(rollout, advantages), 0):
            learner.step(policy, minibatch, loss, weigh=F.sequence_sum)

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
