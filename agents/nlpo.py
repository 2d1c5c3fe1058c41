"""Natural language policy optimisation, NLPO (Ramamurthy et al. 2023, https://arxiv.org/abs/2210.01241).

NLPO is PPO with a restricted set of actions. The masking policy is a copy of the policy, renewed every `mask_refresh`
updates. A token is allowed if it is among the most probable tokens that together have `mask_top_p` of the masking
policy's probability. Log-probabilities are those of the masked distribution from which the tokens were sampled, with
the same masks. Masks are used in training only. With `mask_top_p = 1` there is no mask, and NLPO is PPO.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents.learner import METRICS as LEARNER_METRICS
from agents.learner import Learner
from agents.training import AdapterCopy, Batch, require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect

DEFAULTS = {"critic": "head"}
"""Defaults of `lmgym train` for this algorithm; the user's options override them."""
MASK = "nlpo_mask"
"""The masking policy's adapter."""


@dataclass(frozen=True)
class Config:
    """NLPO's own settings."""

    updates: int = 24
    """Rollouts, each followed by `epochs` passes over it."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatch_rows: int = 16
    """Completions per optimizer step; 0 for the whole rollout."""
    mask_top_p: float = 0.9
    """Top-p of the mask: the probability, under the masking policy, of the tokens that are allowed."""
    mask_refresh: int = 5
    """Updates after which the policy is copied to the masking policy again."""
    lam: float = 0.95
    """GAE's λ; the discount is 1."""
    clip: float = 0.2
    """Clips the probability ratio to 1 ± this value."""
    value_coef: float = 0.1
    """Weight of the value loss."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", "minibatch_rows", "value_coef", least=0)
        require.in_range(self, "epochs", "mask_refresh", least=1)
        require.in_range(self, "mask_top_p", above=0, most=1)
        require.in_range(self, "lam", least=0, most=1)
        require.in_range(self, "clip", above=0)


METRICS = LEARNER_METRICS | {
    "policy/clip_fraction": "share of tokens whose ratio was clipped",
    "value/loss": "clipped value loss, mean over tokens",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.critic(policy, "nlpo")
    require.kl(policy, env, "nlpo")
    whole, adapter = require.adapter(policy, "nlpo's masking policy")
    buffer, metrics = RolloutBuffer.like(env), learner.metrics
    masking_policy = learner.register("mask", AdapterCopy(whole.lm, adapter, MASK))

    def loss(new: Evaluation, old: Batch) -> Tensor:
        value_loss = F.clipped_value_loss(new.value, old.values, old.returns)
        metrics.add("value/loss", value_loss, old.mask)
        metrics.add("policy/clip_fraction", F.is_clipped(new.logp, old.logp, config.clip), old.mask)
        return F.clipped_surrogate(new.logp, old.logp, old.advantages, config.clip) + config.value_coef * value_loss

    for update in learner.updates(config.updates):
        if update % config.mask_refresh == 0:
            masking_policy.renew()
        masked = whole.truncated(top_p=config.mask_top_p, by=MASK)

        # Prompts -> tokens -> scores.
        rollout = collect(masked, env, buffer, Stream(learner.seed, update))
        values, mask = rollout.values, rollout.is_action

        # Scores -> rewards -> advantages.
        advantages, returns = F.gae(rollout.rewards, values, mask, rollout.bootstrap, 1.0, config.lam)
        batch = Batch.of(rollout, F.whiten(advantages, mask), returns)

        # Advantages -> clipped steps.
        for _ in range(config.epochs):
            for minibatch in learner.minibatches(batch, config.minibatch_rows):
                learner.step(masked, minibatch, loss)

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
