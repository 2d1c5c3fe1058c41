"""Group relative policy optimisation (Shao et al. 2024), with its published corrections as settings.

The defaults are the paper's. They are biased in three ways, each with the field that mends it: dividing by the group's
deviation favours prompts that are nearly solved or nearly hopeless, and changes the price of a KL in the loss, which is
not divided (`scale=False`, Dr. GRPO: Liu et al. 2025); the k3 loss has not the KL's gradient (`kl_loss="ratio_k3"`, or
"none" where the environment pays KL); the mean over a completion's tokens favours long wrong answers
(`aggregate="constant"`, Dr. GRPO). docs/algorithms/grpo.md has the measurements.
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
    """Completions of each prompt, which are compared with one another."""
    epochs: int = 1
    """Passes over a rollout."""
    minibatch_rows: int = 0
    """Completions per optimizer step; 0 takes the whole rollout."""
    clip: float = 0.2
    """Clips the probability ratio to 1 − this."""
    clip_high: float = 0.2
    """Clips the probability ratio to 1 + this (DAPO, Yu et al. 2025: 0.28)."""
    scale: bool = True
    """Divide advantages by the group's standard deviation."""
    aggregate: Literal["sequence", "token", "constant"] = "sequence"
    """The mean of the losses: of each completion and then of those, of all tokens (DAPO), or over the token budget (Dr.
    GRPO)."""
    ratio: Literal["token", "sequence"] = "token"
    """The probability ratio: each token's, or the geometric mean over the completion (GSPO, Zheng et al. 2025)."""
    kl_loss: str = "k3"
    """KL in the loss, by "k3", "ratio_k3" or "k2"; "none" where the environment pays it in the reward."""

    def __post_init__(self) -> None:
        require.one_of("aggregate", self.aggregate, AGGREGATES)
        require.one_of("ratio", self.ratio, ("token", "sequence"))
        require.in_range(self, "updates", "minibatch_rows", least=0)
        require.in_range(self, "epochs", least=1)
        require.in_range(self, "clip", "clip_high", above=0)

    @property
    def env_kl(self) -> str:
        """The environment's `kl` that goes with these settings."""
        return "sampled" if self.kl_loss == "none" else "none"


METRICS = LEARNER_METRICS | {
    "policy/clip_fraction": "share of tokens whose ratio lies outside 1 ± `clip`",
    "group/deviation": "standard deviation of the return within a group, mean over groups",
    "group/equal_share": "share of groups whose returns are all equal, which teach nothing",
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
        metrics.add("policy/clip_fraction", F.outside(logp, old_logp, config.clip), old.mask)
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
