"""Distillation (Hinton et al. 2015) from a teacher policy: minimise KL(teacher ‖ policy) on the teacher's samples.

The teacher's completions are samples of its distribution over sequences (Kim & Rush 2016). At each of their tokens the
KL is summed over the whole vocabulary, so the gradient is exactly 0 if policy and teacher are the same distribution.

Papers: https://arxiv.org/abs/1503.02531 (Hinton et al.), https://arxiv.org/abs/1606.07947 (Kim & Rush).
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
    """Distillation's own settings."""

    updates: int = 50
    """Rollouts of the teacher."""
    minibatch_rows: int = 0
    """Completions per optimizer step; 0 for the whole rollout."""

    def __post_init__(self) -> None:
        require.in_range(self, "updates", "minibatch_rows", least=0)

    @property
    def env_kl(self) -> str:
        """The environment's `kl` that these settings need: "none", because rewards are not used."""
        return "none"


METRICS = (
    ROLLOUT_METRICS
    | STEP_METRICS
    | {
        "distill/kl_nats": "KL(teacher ‖ policy) over the vocabulary, mean over the teacher's tokens, in nats",
    }
)


def train(
    policy: TokenPolicy, env: TokenVectorEnv, learner: Learner, config: Config, teacher: TokenPolicy
) -> Iterator[dict[str, float]]:
    """Trains the policy; yields the `METRICS` of each update. The score, KL and token metrics are the teacher's."""
    require.given(teacher, "a teacher", "distill", "pass a policy of the same vocabulary (--teacher RUN)")
    buffer = RolloutBuffer.like(env)

    def loss(rows: Tensor) -> Tensor:
        """KL(teacher ‖ policy), summed over the actions of these rows of the rollout, in nats."""
        sequences, mask = buffer.sequences[rows], buffer.is_action[rows]
        with torch.no_grad():
            target = teacher.log_probs(sequences)
        kl = F.forward_kl(target, policy.log_probs(sequences))
        learner.metrics.add("distill/kl_nats", kl, mask)
        return torch.where(mask, kl, 0.0).sum()

    for update in learner.updates(config.updates):
        # Prompts -> the teacher's tokens.
        rollout = collect(teacher, env, buffer, Stream(learner.seed, update))

        # Tokens -> steps.
        for minibatch in learner.minibatch_indices(rollout.rows, config.minibatch_rows):
            actions = rollout.is_action[minibatch].sum()
            learner.minimise(
                minibatch,
                lambda rows, n=actions: loss(rows) / n,
                model=policy,
                tokens=rollout.columns,
                whole_logits=True,
            )

        yield learner.summarise(rollout)
