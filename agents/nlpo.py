"""Natural language policy optimisation (Ramamurthy et al. 2023): PPO whose actions a masking policy narrows down.

The masking policy is a copy of the policy, refreshed every `mask_refresh` updates. A token may be chosen if it is among
the most probable that hold `mask_top_p` of the masking policy's probability. What was sampled is what is scored: the
log-probabilities are those of the masked distribution, with the very masks of the rollout. Only training is masked, and
with `mask_top_p = 1` nothing is: then this is PPO.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents import learner as common
from agents.learner import Batch, Learner
from agents.training import AdapterCopy, require
from lmgym.env import TokenVectorEnv
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect

DEFAULTS = {"critic": "head"}
"""What `lmgym train` sets for this algorithm, where the user says nothing."""
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
    """Completions per optimizer step; 0 takes the whole rollout."""
    mask_top_p: float = 0.9
    """How much of the masking policy's probability may be chosen from."""
    mask_refresh: int = 5
    """Copies the policy into the masking policy every so many updates."""
    lam: float = 0.95
    """GAE's λ; the discount is 1."""
    clip: float = 0.2
    """Clips the probability ratio to 1 ± this."""
    value_coef: float = 0.1
    """Weight of the value loss."""


METRICS = common.METRICS | {
    "policy/clip_fraction": "share of tokens whose ratio was clipped",
    "value/loss": "clipped value loss, mean over tokens",
}


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.critic(policy, "nlpo")
    require.kl(policy, env, "nlpo")
    whole, adapter = require.adapter(policy, "nlpo's masking policy")
    buffer, mask = RolloutBuffer.like(env), learner.register("mask", AdapterCopy(whole.lm, adapter, MASK))
    for update in learner.updates(config.updates):
        learner.schedule(update / config.updates)
        if update % config.mask_refresh == 0:
            mask.renew()
        masked = whole.truncated(top_p=config.mask_top_p, by=MASK)

        # Prompts -> tokens -> scores.
        collect(masked, env, buffer, Stream(learner.seed, update))

        # Scores -> rewards -> advantages.
        advantages, returns = F.gae(buffer.rewards, buffer.values, buffer.is_action, buffer.bootstrap, 1.0, config.lam)
        advantages = F.whiten(advantages, buffer.is_action)

        # Advantages -> steps.
        def loss(new: Evaluation, old: Batch) -> Tensor:
            value_loss = F.clipped_value_loss(new.value, old.values, old.returns)
            learner.metrics.add("value/loss", value_loss, old.mask)
            learner.metrics.add("policy/clip_fraction", F.outside(new.logp, old.logp, config.clip), old.mask)
            return F.clipped_surrogate(new.logp, old.logp, old.advantages, config.clip) + config.value_coef * value_loss

        batch = Batch.of(buffer, advantages, returns)
        learner.fit(masked, batch, loss, epochs=config.epochs, minibatch_rows=config.minibatch_rows)
        yield learner.summarise(buffer, env)
