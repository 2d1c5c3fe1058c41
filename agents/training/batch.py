"""The training data of one update, and the type of an algorithm's loss."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from lmgym.models import Sequences
from lmgym.policy import Evaluation
from lmgym.rollout import RolloutBuffer


@dataclass(frozen=True)
class Batch:
    """The rows of a rollout with their advantages; indexing by rows gives a minibatch.

    Attributes:
        sequences: prompts and actions.
        mask: [B, T] True where an action was taken.
        logp: [B, T] log π_old of the actions in nats, recorded when they were sampled.
        values: [B, T] the critic's estimates, recorded then.
        reference_logp: [B, T] log π_ref of the actions in nats.
        rewards: [B, T] rewards from the environment.
        advantages: [B, T] advantages of the actions.
        returns: [B, T] targets of the critic.
    """

    sequences: Sequences
    mask: Bool[Tensor, "B T"]
    logp: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    reference_logp: Float[Tensor, "B T"]
    rewards: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]

    @classmethod
    def of(cls, rollout: RolloutBuffer, advantages: Tensor, returns: Tensor | None = None) -> "Batch":
        """A rollout with its advantages: [B, T], or [B] to give all actions of a row the same advantage."""
        advantages = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(rollout.logp)
        observed = (rollout.logp, rollout.values, rollout.reference_logp, rollout.rewards)
        targets = (advantages, rollout.values if returns is None else returns)
        return cls(rollout.sequences, rollout.is_action, *observed, *targets)

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, rows: Tensor) -> "Batch":
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def first_steps(self, steps: int) -> "Batch":
        """The batch cut to its first `steps` actions."""
        rest = (getattr(self, name)[:, :steps] for name in self.__dataclass_fields__ if name != "sequences")
        return Batch(self.sequences.first_steps(steps), *rest)


Loss = Callable[[Evaluation, Batch], Tensor]
"""Computes an algorithm's loss of each action, [B, T], from the policy's new evaluation and the batch.

It gets some rows of a minibatch at a time, with T cut to the longest of them. A row's loss must not depend on other
rows.
"""
