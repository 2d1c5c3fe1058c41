"""Proximal policy optimisation (Schulman et al. 2017) for language models (Ziegler et al. 2019; Stiennon et al. 2020).

What differs from PPO as it is known from control: an episode is one completion, and a batch holds whole episodes; the
discount is 1; the reward is a score at the last token, less β·KL to the reference at every token; log-probabilities and
values come from the pass that decoded the tokens; the critic shares the policy's trunk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from agents import functional as F
from agents import learner as common
from agents.learner import Batch, Learner
from agents.training import AdapterCopy, RunningScale, require
from lmgym.env import TokenVectorEnv
from lmgym.models import Example
from lmgym.policy import Evaluation, TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect

DEFAULTS = {"critic": "head"}
"""What `lmgym train` sets for this algorithm, where the user says nothing."""


@dataclass(frozen=True)
class Config:
    """PPO's own settings; those of the optimizer are in `LearnerConfig`."""

    updates: int = 28
    """Rollouts, each followed by `epochs` passes over it."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatch_rows: int = 16
    """Completions per optimizer step; 0 takes the whole rollout."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's λ."""
    clip: float = 0.2
    """Clips the probability ratio to 1 ± this."""
    dual_clip: float = 0.0
    """Bounds the loss of actions of negative advantage to this many times −A (Ye et al. 2020: 3); 0 does not."""
    value_clip: float = 0.2
    """Clips the change of the value."""
    value_coef: float = 0.1
    """Weight of the value loss; 0 with a policy that has no critic (and then λ wants to be 1)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token in nats."""
    whiten_advantages: bool = True
    """Centre and scale advantages over the rollout."""
    whiten_rewards: bool = False
    """Scale rewards over the rollout, their mean left as it is (Ziegler et al. 2019)."""
    scale_score: bool = False
    """Divide scores by the standard deviation of all that were seen so far."""
    score_clip: float = 0.0
    """Clip scores, after scaling, to ± this; 0 does not."""
    target_kl: float = 1.0
    """Ends an update's epochs when KL(old ‖ new) per token, in nats, exceeds this; 0 never does."""
    kl_loss: str = "none"
    """KL in the loss, by "k2" or "ratio_k3", for an environment that does not pay it in the reward."""
    reference_refresh: int = 0
    """Makes the policy its own reference every so many updates (DeepSeek-R1: 400 steps); 0 never does."""
    ptx_coef: float = 0.0
    """Weight of the log-likelihood of given texts, per token in nats ("PPO-ptx", Ouyang et al. 2022); 0 needs none."""
    ptx_rows: int = 16
    """Given texts per optimizer step."""

    @property
    def env_kl(self) -> str:
        """The environment's `kl` that goes with these settings."""
        return "sampled" if self.kl_loss == "none" else "none"


METRICS = common.METRICS | {
    "policy/clip_fraction": "share of tokens whose ratio was clipped",
    "value/loss": "clipped value loss, mean over tokens",
    "value/explained_variance": "1 − Var(return − value) / Var(return)",
    "ptx/loss": "negative log-likelihood of given texts, mean over tokens, in nats; where `ptx_coef` is not 0",
}


def train(
    policy: TokenPolicy,
    env: TokenVectorEnv,
    learner: Learner,
    config: Config,
    examples: Sequence[Example] | None = None,
) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update, and leaves logging, saving and stopping to the caller."""
    if config.value_coef:
        require.critic(policy, "ppo with value_coef")
    require.kl(policy, env, "ppo", config.kl_loss)
    buffer, metrics = RolloutBuffer.like(env), learner.metrics
    scale = learner.register("scale", RunningScale())
    ptx = _ptx(policy, learner, config, examples) if config.ptx_coef else None
    reference = _reference(policy, env, learner) if config.reference_refresh else None
    for update in learner.updates(config.updates):
        learner.schedule(update / config.updates)
        if reference and update and update % config.reference_refresh == 0:
            reference.renew()

        # Prompts -> tokens -> scores.
        collect(policy, env, buffer, Stream(learner.seed, update))
        mask = buffer.is_action

        # Scores -> rewards -> advantages.
        score = buffer.score / scale.update(buffer.score) if config.scale_score else buffer.score
        score = score.clamp(-config.score_clip, config.score_clip) if config.score_clip else score
        rewards = buffer.rewards + buffer.at_last(score - buffer.score)
        rewards = F.whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
        advantages, returns = F.gae(rewards, buffer.values, mask, buffer.bootstrap, config.gamma, config.lam)
        advantages = F.whiten(advantages, mask) if config.whiten_advantages else advantages
        metrics.add("value/explained_variance", F.explained_variance(buffer.values, returns, mask))

        # Advantages -> steps.
        def loss(new: Evaluation, old: Batch) -> Tensor:
            policy_loss = F.clipped_surrogate(
                new.logp, old.logp, old.advantages, config.clip, dual_clip=config.dual_clip
            )
            value_loss = F.clipped_value_loss(new.value, old.values, old.returns, config.value_clip)
            metrics.add("policy/clip_fraction", F.outside(new.logp, old.logp, config.clip), old.mask)
            metrics.add("value/loss", value_loss, old.mask)
            loss = policy_loss + config.value_coef * value_loss
            if config.entropy_coef:
                loss = loss - config.entropy_coef * new.entropy
            if config.kl_loss != "none":
                kl = F.kl_loss(config.kl_loss, new.logp, old.logp, old.reference_logp)
                loss = loss + env.kl_controller.beta * kl
            return loss

        learner.fit(
            policy,
            Batch.of(buffer, advantages, returns),
            loss,
            epochs=config.epochs,
            minibatch_rows=config.minibatch_rows,
            target_kl=config.target_kl,
            extra=ptx,
        )
        yield learner.summarise(buffer, env)


def _reference(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner) -> AdapterCopy:
    lm_policy, adapter = require.adapter(policy, "reference_refresh")
    return learner.register("reference", AdapterCopy(lm_policy.lm, adapter, "reference", env.set_reference))


def _ptx(
    policy: TokenPolicy, learner: Learner, config: Config, examples: Sequence[Example] | None
) -> Callable[[], Tensor]:
    require.given(examples, "texts", "ptx_coef", "give train() examples, or set ptx_coef to 0")
    assert examples is not None
    imitator, _ = require.adapter(policy, "ptx_coef")
    imitator = imitator.truncated()  # texts that others wrote hold tokens that truncated sampling leaves out
    batches = learner.example_batches(imitator.lm, examples, config.ptx_rows)

    def loss() -> Tensor:
        texts = next(batches)
        nll = F.masked_mean(-imitator.evaluate(texts.sequences).logp, texts.is_learned)
        learner.metrics.add("ptx/loss", nll)
        return config.ptx_coef * nll

    return loss
