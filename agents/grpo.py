"""Group relative policy optimisation, GRPO (Shao et al. 2024, https://arxiv.org/abs/2402.03300).

The published corrections are settings; the defaults are the paper's. The defaults have three biases:

- Division by the group's standard deviation gives a large weight to prompts that are almost always or almost never
  solved. It also changes the weight of a KL in the loss, which is not divided. Correction: `scale=False` (Dr. GRPO: Liu
  et al. 2025, https://arxiv.org/abs/2503.20783).
- The gradient of the k3 loss is not that of the KL. Correction: `kl_loss="ratio_k3"`, or "none" if the environment pays
  the KL in the reward.
- The mean over a completion's tokens favours long wrong answers. Correction: `aggregate="constant"` (Dr. GRPO).

docs/algorithms/grpo.md has measurements. Other variants: DAPO (https://arxiv.org/abs/2503.14476) and GSPO
(https://arxiv.org/abs/2507.18071).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from agents import functional as F
from agents.learner import METRICS as LEARNER_METRICS
from agents.learner import Learner
from agents.training import Batch, require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect

AGGREGATES = {"sequence": F.sequence_mean, "token": F.token_mean, "constant": F.constant_mean}


@dataclass(frozen=True)
class Config:
    """GRPO's own settings."""

    updates: int = 100
    """Rollouts."""
    group: int = 8
    """Completions of each prompt, whose returns are compared."""
    epochs: int = 1
    """Passes over a rollout."""
    minibatch_rows: int = 0
    """Completions per optimizer step; 0 for the whole rollout."""
    clip: float = 0.2
    """Lower bound of the probability ratio: 1 − this."""
    clip_high: float = 0.2
    """Upper bound of the probability ratio: 1 + this (0.28 in DAPO, Yu et al. 2025)."""
    scale: bool = True
    """Divide advantages by the group's standard deviation."""
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    """Mean of the token losses: "sequence", over each completion and then over completions; "token", over all tokens
    (DAPO); "constant", their sum over the token budget (Dr. GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """Probability ratio: of each token, or its geometric mean over the completion (GSPO, Zheng et al. 2025)."""
    kl_loss: str = "k3"
    """Estimator of a KL in the loss: "k3", "ratio_k3" or "k2"; if "none", the environment pays the KL in the reward."""

    def __post_init__(self) -> None:
        require.one_of("aggregate", self.aggregate, AGGREGATES)
        require.one_of("ratio", self.ratio, ("token", "sequence"))
        require.in_range(self, "updates", "minibatch_rows", least=0)
        require.in_range(self, "epochs", least=1)
        require.in_range(self, "clip", "clip_high", above=0)

    @property
    def env_kl(self) -> str:
        """The environment's `kl` that these settings need."""
        return "sampled" if self.kl_loss == "none" else "none"


METRICS = LEARNER_METRICS | {
    "policy/clip_fraction": "share of tokens whose ratio is outside 1 ± `clip`",
    "group/deviation": "standard deviation of the return within a group, mean over groups",
    "group/equal_share": "share of groups whose returns are all equal, which give no gradient",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "grpo", config.kl_loss, biased=("k3",))
    require.groups(env.num_envs, config.group, "grpo")
    buffer, metrics, weigh = RolloutBuffer.like(env), learner.metrics, AGGREGATES[config.aggregate]

    def loss(new: Evaluation, old: Batch) -> Tensor:
        logp, old_logp = new.logp, old.logp
        if config.ratio == "sequence":
            logp, old_logp = F.sequence_logp_ratio(logp, old_logp, old.mask), torch.zeros_like(old_logp)
        metrics.add("policy/clip_fraction", F.is_clipped(logp, old_logp, config.clip), old.mask)
        loss = F.clipped_surrogate(logp, old_logp, old.advantages, config.clip, config.clip_high)
        if config.kl_loss != "none":
            loss = loss + env.kl_controller.beta * F.kl_loss(config.kl_loss, new.logp, old.logp, old.reference_logp)
        return loss

    for update in learner.updates(config.updates):
        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update, config.group))

        # Scores -> rewards -> advantages.
        returns = rollout.rewards.sum(1)
        advantages = F.group_relative(returns, config.group, config.scale)
        deviation = returns.view(-1, config.group).std(1)
        metrics.add("group/deviation", deviation)
        metrics.add("group/equal_share", (deviation < 1e-6).float())

        # Advantages -> clipped steps.
        batch = Batch.of(rollout, advantages)
        for _ in range(config.epochs):
            for minibatch in learner.minibatches(batch, config.minibatch_rows):
                learner.step(policy, minibatch, loss, weigh)

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
