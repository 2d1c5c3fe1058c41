"""A rollout with its advantages, as an update learns from it, and the form of a loss."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from lmgym.models import Sequences
from lmgym.policy import Evaluation
from lmgym.rollout import RolloutBuffer


@dataclass(frozen=True)
class Batch:
    """A rollout as an update learns from it; indexing takes rows.

    Attributes:
        sequences: prompts and actions.
        mask: [B, T] True where an action was taken.
        logp: [B, T] log π_old of the actions in nats.
        values: [B, T] the critic's estimates when they were taken.
        reference_logp: [B, T] log π_ref of the actions in nats.
        rewards: [B, T] what the environment paid for them.
        advantages: [B, T] how much better than expected an action was.
        returns: [B, T] what the critic should have said.
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
    def of(cls, buffer: RolloutBuffer, advantages: Tensor, returns: Tensor | None = None) -> "Batch":
        """A rollout with its advantages: [B, T], or [B] for all of a row's actions alike."""
        advantages = advantages if advantages.ndim == 2 else advantages[:, None].expand_as(buffer.logp)
        kept = (buffer.sequences, buffer.is_action, buffer.logp, buffer.values, buffer.reference_logp, buffer.rewards)
        return cls(*kept, advantages, buffer.values if returns is None else returns)

    def __getitem__(self, rows: Tensor) -> "Batch":
        return Batch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def first_steps(self, steps: int) -> "Batch":
        """Without the steps that follow the first `steps`."""
        rest = (getattr(self, name)[:, :steps] for name in self.__dataclass_fields__ if name != "sequences")
        return Batch(self.sequences.first_steps(steps), *rest)


Loss = Callable[[Evaluation, Batch], Tensor]
"""An algorithm's loss of each action, [B, T], from what the policy says now and what was true when it acted.

It sees some rows of a minibatch at a time, cut to the longest of them, so a row's loss may not depend on other rows.
"""
