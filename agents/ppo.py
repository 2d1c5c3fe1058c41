"""Proximal policy optimisation (Schulman et al. 2017) for language models (Ziegler et al. 2019; Stiennon et al. 2020).

What differs from PPO as it is known from control: an episode is one completion, and a batch holds whole episodes; the
discount is 1; the reward is a score at the last token, less β·KL to the reference at every token; log-probabilities and
values come from the pass that decoded the tokens; the critic shares the policy's trunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from agents import functional as F
from agents.learner import Learner
from lmgym.env import Finish, TokenVectorEnv
from lmgym.policy import Policy
from lmgym.reward import kl_estimates
from lmgym.rollout import RolloutBuffer, Stream, collect


@dataclass(frozen=True)
class Config:
    """PPO's own settings; those of the optimizer are in `LearnerConfig`."""

    updates: int = 24
    """Rollouts, each followed by `epochs` passes over it."""
    epochs: int = 2
    """Passes over a rollout."""
    minibatch_rows: int = 16
    """Completions per optimizer step."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's λ."""
    clip: float = 0.2
    """Clips the probability ratio to 1 ± this."""
    value_clip: float = 0.2
    """Clips the change of the value."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, per token in nats."""
    whiten_advantages: bool = True
    """Centre and scale advantages over the rollout."""
    target_kl: float = 1.0
    """Ends an update's epochs when KL(old ‖ new) per token, in nats, exceeds this; 0 never does."""


METRICS = {
    "score/mean": "composed score of the rollout's completions, mean over rows",
    "reward/sequence": "score less β·KL, summed over a row's tokens, mean over rows",
    "kl/sequence_nats": "KL to the reference, k1 summed over a row's tokens, mean over rows, in nats",
    "kl/token_k3_nats": "KL to the reference by k3, mean over tokens, in nats",
    "kl/beta": "β, in score per nat",
    "tokens/mean": "tokens per completion",
    "tokens/unfinished_share": "share of completions that reached the token budget",
    "policy/loss": "clipped surrogate, mean over tokens of the whole update",
    "policy/entropy_nats": "entropy of the next-token distribution, mean over tokens, in nats",
    "policy/old_kl_nats": "KL(old ‖ new) by k3, mean over tokens of the whole update, in nats",
    "policy/clip_share": "share of tokens whose ratio was clipped",
    "policy/ratio_deviation": "|ratio − 1|, mean over tokens of the first minibatch; 0 but for rounding",
    "value/loss": "clipped value loss, mean over tokens",
    "value/explained_variance": "1 − Var(return − value) / Var(return)",
    "optimizer/grad_norm": "norm of the gradient before clipping, mean over optimizer steps",
    "optimizer/lr": "learning rate",
    "optimizer/steps": "optimizer steps of the update",
}


def train(policy: Policy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update, and leaves logging, saving and stopping to the caller."""
    buffer = RolloutBuffer.like(env)
    metrics = learner.metrics
    for update in range(config.updates):
        lr = learner.schedule(update / config.updates)

        # Prompts -> tokens -> scores.
        collect(policy, env, buffer, Stream(learner.seed, update))

        # Scores -> rewards -> advantages.
        is_action = buffer.is_action
        advantages, returns = F.gae(
            buffer.rewards, buffer.values, is_action, buffer.bootstrap, config.gamma, config.lam
        )
        if config.whiten_advantages:
            advantages = F.whiten(advantages, is_action)

        # Advantages -> steps.
        steps = 0
        for _ in range(config.epochs):
            for rows in learner.minibatches(buffer.rows, config.minibatch_rows):
                mask, old_logp = is_action[rows], buffer.logp[rows]
                new = policy.evaluate(buffer.sequences[rows])
                policy_loss = F.clipped_surrogate(new.logp, old_logp, advantages[rows], config.clip)
                value_loss = F.clipped_value_loss(new.value, buffer.values[rows], returns[rows], config.value_clip)
                loss = policy_loss + config.value_coef * value_loss - config.entropy_coef * new.entropy
                learner.step(F.masked_mean(loss, mask))

                ratio = (new.logp - old_logp).exp().detach()
                metrics.add("policy/loss", policy_loss, mask)
                metrics.add("value/loss", value_loss, mask)
                metrics.add("policy/entropy_nats", new.entropy, mask)
                metrics.add("policy/old_kl_nats", ratio - 1 - (new.logp - old_logp), mask)
                metrics.add("policy/clip_share", ((ratio - 1).abs() > config.clip).float(), mask)
                if steps == 0:
                    metrics.add("policy/ratio_deviation", (ratio - 1).abs(), mask)
                steps += 1
            if config.target_kl and metrics.mean("policy/old_kl_nats") > config.target_kl:
                break

        estimates = kl_estimates(buffer.logp, buffer.reference_logp)
        metrics.add("score/mean", buffer.score)
        metrics.add("reward/sequence", buffer.rewards.sum(1))
        metrics.add("kl/sequence_nats", (estimates["k1"] * is_action).sum(1))
        metrics.add("kl/token_k3_nats", estimates["k3"], is_action)
        metrics.add("tokens/mean", is_action.sum(1))
        metrics.add("tokens/unfinished_share", (buffer.finish == Finish.LENGTH).float())
        metrics.add("value/explained_variance", F.explained_variance(buffer.values, returns, is_action))
        row = metrics.drain() | {"kl/beta": env.kl_controller.beta, "optimizer/lr": lr, "optimizer/steps": float(steps)}
        env.kl_controller.update(row["kl/sequence_nats"], buffer.rows)
        yield row
