"""Proximal policy optimisation, PPO (Schulman et al. 2017, https://arxiv.org/abs/1707.06347), for language models.

As in Ziegler et al. 2019 (https://arxiv.org/abs/1909.08593) and Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325).
What differs from PPO for control problems: an episode is one completion, and a batch holds whole episodes; the discount
is 1; the reward is the score at the last token, minus β·KL to the reference at every token; the old log-probabilities
and values come from the pass that sampled the tokens; the critic is an adapter of its own on the policy's base.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents.learner import METRICS as LEARNER_METRICS
from agents.learner import Learner
from agents.training import Batch, ReferenceRefresh, ScoreShaping, pretraining_loss, require
from lmgym.env import TokenVectorEnv
from lmgym.models import Example
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect

DEFAULTS = {"critic": "adapter", "critic_lr_factor": 4.0}
"""Defaults of `lmgym train` for this algorithm; the user's options override them."""


@dataclass(frozen=True)
class Config:
    """PPO's own settings; those of the optimizer are in `LearnerConfig`."""

    updates: int = 28
    """Rollouts, each followed by `epochs` passes over it."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatch_rows: int = 16
    """Completions per optimizer step; 0 for the whole rollout."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's λ."""
    clip: float = 0.2
    """Clips the probability ratio to 1 ± this value."""
    dual_clip: float = 0.0
    """Dual clip c: bounds the loss by −c A if the advantage A is negative (3 in Ye et al. 2020); 0 is off."""
    value_clip: float = 0.0
    """Clips the value to within this distance of the old value, in the value loss; 0 is off."""
    value_coef: float = 0.1
    """Weight of the value loss; 0 for a policy without a critic (set λ to 1 too)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token in nats."""
    whiten_advantages: bool = True
    """Whiten advantages over the rollout: mean 0, standard deviation 1."""
    whiten_rewards: bool = False
    """Scale rewards over the rollout to standard deviation 1 and keep their mean (Ziegler et al. 2019)."""
    scale_score: bool = False
    """Divide scores by the standard deviation of all scores so far."""
    score_clip: float = 0.0
    """Clip scores, after scaling, to ± this; 0 is off."""
    target_kl: float = 1.0
    """Early stopping: no further epochs in an update once KL(old ‖ new), in nats per token, exceeds this; 0 is off."""
    kl_loss: str = "none"
    """Estimator of a KL in the loss: "k2" or "ratio_k3"; with "none" the environment pays the KL in the reward."""
    reference_refresh: int = 0
    """Updates after which the present policy becomes the reference (400 steps in DeepSeek-R1); 0 is off."""
    ptx_coef: float = 0.0
    """Weight of the log-likelihood of user-supplied texts, nats per token (PPO-ptx, Ouyang et al. 2022); 0 is off."""
    ptx_rows: int = 16
    """User-supplied texts per optimizer step, for `ptx_coef`."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", "minibatch_rows", "reference_refresh", least=0)
        require.in_range(self, "epochs", "ptx_rows", least=1)
        require.in_range(self, "gamma", "lam", least=0, most=1)
        require.in_range(self, "clip", above=0)
        require.in_range(self, "dual_clip", "value_clip", "value_coef", "score_clip", "target_kl", "ptx_coef", least=0)
        require.in_range(self, "entropy_coef")

    @property
    def env_kl(self) -> str:
        """The environment's `kl` that these settings need."""
        return "sampled" if self.kl_loss == "none" else "none"


METRICS = LEARNER_METRICS | {
    "policy/clip_fraction": "share of tokens whose ratio was clipped",
    "value/loss": "clipped value loss, mean over tokens",
    "value/explained_variance": "1 − Var(return − value) / Var(return)",
    "ptx/loss": "negative log-likelihood of the user-supplied texts, mean over tokens, in nats; if `ptx_coef` is not 0",
}


def train(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    learner: Learner,
    config: Config,
    examples: Sequence[Example] | None = None,
) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update. The caller logs, saves and stops early."""
    if config.value_coef:
        require.critic(policy, "ppo with value_coef")
    require.kl(policy, env, "ppo", config.kl_loss)
    buffer, metrics = RolloutBuffer.like(env), learner.metrics
    shaping = learner.register("scale", ScoreShaping(config.scale_score, config.score_clip))
    refresh = learner.register("reference", ReferenceRefresh(policy, env, config.reference_refresh))
    ptx = pretraining_loss(policy, learner.example_batches, metrics, examples, config.ptx_coef, config.ptx_rows)

    def loss(new: Evaluation, old: Batch) -> Tensor:
        policy_loss = F.clipped_surrogate(new.logp, old.logp, old.advantages, config.clip, dual_clip=config.dual_clip)
        value_loss = F.clipped_value_loss(new.value, old.values, old.returns, config.value_clip)
        metrics.add("policy/clip_fraction", F.is_clipped(new.logp, old.logp, config.clip), old.mask)
        metrics.add("value/loss", value_loss, old.mask)
        loss = policy_loss + config.value_coef * value_loss
        if config.entropy_coef:
            loss = loss - config.entropy_coef * new.entropy
        if config.kl_loss != "none":
            loss = loss + env.kl_controller.beta * F.kl_loss(config.kl_loss, new.logp, old.logp, old.reference_logp)
        return loss

    for update in learner.updates(config.updates):
        refresh.before(update)

        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update))
        values, mask = rollout.values, rollout.is_action

        # Scores -> rewards -> advantages.
        rewards = shaping.rewards(rollout)
        if config.whiten_rewards:
            rewards = F.whiten(rewards, mask, shift_mean=False)
        advantages, returns = F.gae(rewards, values, mask, rollout.bootstrap, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages = F.whiten(advantages, mask)
        metrics.add("value/explained_variance", F.explained_variance(values, returns, mask))

        # Advantages -> clipped steps.
        batch = Batch.of(rollout, advantages, returns)
        for _ in range(config.epochs):
            for minibatch in learner.minibatches(batch, config.minibatch_rows):
                learner.step(policy, minibatch, loss, extra=ptx)
            if config.target_kl and learner.approx_kl > config.target_kl:
                break

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
