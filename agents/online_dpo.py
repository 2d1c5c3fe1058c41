"""Online DPO (Guo et al. 2024): DPO on pairs that the policy has just written, the environment's score as annotator.

What differs from offline DPO (agents/dpo.py) is only where the pairs come from: of two completions of each prompt, the
one of the higher score is chosen. Pairs of equal score teach nothing and are left out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from agents import functional as F
from agents import learner as common
from agents.learner import Learner
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
    """Pairs per optimizer step; 0 takes them all."""
    label_smoothing: float = 0.0
    """How often the score is taken to be wrong."""


METRICS = (
    common.ROLLOUT_METRICS
    | common.STEP_METRICS
    | {
        "loss/train": "DPO's loss, mean over the pairs of different score",
        "margin/train": "β (log-ratio of the chosen − log-ratio of the rejected), mean over the same pairs",
        "pairs/share": "share of the pairs whose scores differ",
    }
)


def train(policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update."""
    require.kl(policy, env, "online_dpo")
    require.reference(policy, env)
    require.pairs(env.num_envs, "online_dpo")
    buffer = RolloutBuffer.like(env)
    for update in learner.updates(config.updates):
        learner.schedule(update / config.updates)

        # Prompts -> tokens -> scores, at the price of KL that now holds.
        collect(policy, env, buffer, Stream(learner.seed, update, samples=2))
        beta = env.kl_controller.beta

        # Scores -> which of the two is chosen: +1 for the first, −1 for the second, 0 for neither.
        chosen = torch.sign(buffer.score[::2] - buffer.score[1::2])
        learner.metrics.add("pairs/share", chosen.abs())

        # Pairs -> steps.
        for pairs in learner.minibatches(len(chosen), config.minibatch_pairs or len(chosen)):
            different = (chosen[pairs] != 0).sum().clamp(min=1)

            def share(
                part: Tensor, chosen: Tensor = chosen, different: Tensor = different, beta: float = beta
            ) -> Tensor:
                rows = torch.stack([2 * part, 2 * part + 1], 1).flatten()
                log_ratio = policy.evaluate(buffer.sequences[rows]).logp - buffer.reference_logp[rows]
                log_ratio = torch.where(buffer.is_action[rows], log_ratio, 0.0).sum(1)
                sign = chosen[part]
                loss = F.dpo(sign * log_ratio[::2], sign * log_ratio[1::2], beta, config.label_smoothing)
                learner.metrics.add("loss/train", loss, sign != 0)
                learner.metrics.add("margin/train", beta * sign * (log_ratio[::2] - log_ratio[1::2]), sign != 0)
                return torch.where(sign != 0, loss, 0.0).sum() / different

            learner.minimise(pairs, share)
        yield learner.summarise(buffer, env)
