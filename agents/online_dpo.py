"""Online DPO (Guo et al. 2024, https://arxiv.org/abs/2402.04792): DPO on pairs that the present policy samples.

The only difference from offline DPO (agents/dpo.py) is the source of the pairs: the policy samples two completions of
each prompt, and the one with the higher score is the chosen one. Pairs of equal score are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agents import functional as F
from agents.learner import ROLLOUT_METRICS, STEP_METRICS, Learner
from agents.training import require
from lmgym.env import TokenVectorEnv
from lmgym.policy import TokenPolicy
from lmgym.rollout import RolloutBuffer, Stream, collect


@dataclass(frozen=True)
class Config:
    """Online DPO's own settings."""

    updates: int = 50
    """Rollouts, each followed by one pass over its pairs."""
    minibatch_pairs: int = 0
    """Pairs per optimizer step; 0 for all."""
    label_smoothing: float = 0.0
    """Assumed probability that the score prefers the wrong completion."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", "minibatch_pairs", least=0)
        require.in_range(self, "label_smoothing", least=0, below=0.5)


METRICS = (
    ROLLOUT_METRICS
    | STEP_METRICS
    | {
        "loss/train": "DPO's loss, mean over the pairs whose scores differ",
        "margin/train": "β (log-ratio of the chosen − log-ratio of the rejected), mean over the same pairs",
        "pairs/share": "share of the pairs whose scores differ",
    }
)


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "online_dpo")
    require.reference(policy, env)
    require.pairs(env.num_envs, "online_dpo")
    buffer, metrics = RolloutBuffer.like(env), learner.metrics
    for update in learner.updates(config.updates):
        # Prompts -> tokens -> scores.
        rollout = collect(policy, env, buffer, Stream(learner.seed, update, samples=2))

        # Scores -> the chosen completion: +1 for the first, −1 for the second, 0 for neither.
        chosen = torch.sign(rollout.score[::2] - rollout.score[1::2])
        metrics.add("pairs/share", chosen.abs())

        def loss(pairs: Tensor, chosen: Tensor = chosen, rollout: RolloutBuffer = rollout) -> Tensor:
            """[pairs] DPO's loss with the β of this rollout; 0 where the scores are equal."""
            rows, sign = torch.stack([2 * pairs, 2 * pairs + 1], 1).flatten(), chosen[pairs]
            log_ratio = policy.evaluate(rollout.sequences[rows]).logp - rollout.reference_logp[rows]
            log_ratio = torch.where(rollout.is_action[rows], log_ratio, 0.0).sum(1)
            first, second = sign * log_ratio[::2], sign * log_ratio[1::2]
            loss = F.dpo(first, second, rollout.beta, config.label_smoothing)
            metrics.add("loss/train", loss, sign != 0)
            metrics.add("margin/train", rollout.beta * sign * (log_ratio[::2] - log_ratio[1::2]), sign != 0)
            return torch.where(sign != 0, loss, 0.0)

        # Pairs -> steps.
        for minibatch in learner.minibatch_indices(len(chosen), config.minibatch_pairs):
            different = (chosen[minibatch] != 0).sum().clamp(min=1)
            length = 2 * rollout.columns
            learner.minimise(
                minibatch, lambda pairs, loss=loss, n=different: loss(pairs).sum() / n, model=policy, tokens=length
            )

        row = learner.summarise(rollout)
        env.kl_controller.update(row["kl/sequence_nats"], rollout.rows)
        yield row
