"""The budget of a run in sampled tokens: the environment counts them, and raises when they are spent.

It is against accidents. It is no sandbox: who wants to cheat can.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from agents import functional as F
from agents.learner import Learner
from lmgym.env import Finish, Outcome, TokenVectorEnv
from lmgym.fused import FrozenPrefix


class BudgetSpent(RuntimeError):
    """An agent sampled more tokens than its budget has."""


class Meter:
    """Counts the tokens that an agent samples, in all of its environments together.

    Args:
        budget: tokens that it may sample.

    Attributes:
        spent: tokens sampled so far.
    """

    def __init__(self, budget: int):
        self.budget, self.spent = budget, 0

    @property
    def left(self) -> int:
        """Tokens that may still be sampled."""
        return self.budget - self.spent

    def spend(self, tokens: int) -> None:
        """Counts tokens that were sampled.

        Raises:
            BudgetSpent: they are more than are left.
        """
        self.spent += tokens
        if self.spent > self.budget:
            raise BudgetSpent(
                f"the budget of {self.budget:,} sampled tokens is spent ({self.spent:,} were sampled): loop over "
                "learner.updates(...), which ends in time, or ask world.tokens_left before each rollout"
            )


class MeteredEnv(TokenVectorEnv):
    """A `TokenVectorEnv` whose sampled tokens are counted, whichever way it is driven.

    A rollout that exceeds the budget is paid no rewards, and a step that exceeds it is not taken.

    Args:
        num_envs: B, the number of rows.
        meter: counts them.
        **arguments: as for `TokenVectorEnv`.
    """

    def __init__(self, num_envs: int = 1, *, meter: Meter, **arguments: Any):
        super().__init__(num_envs, **arguments)
        self.meter, self._counted = meter, 0

    def reset(self, **options: Any) -> Any:
        self._count()  # a rollout that was begun and left has been sampled as well
        try:
            return super().reset(**options)
        finally:
            self._counted = int(self.length.sum())

    def step(self, actions: Any) -> Any:
        self._count()
        self.meter.spend(int((self.finish == Finish.RUNNING).sum()))
        try:
            return super().step(actions)
        finally:
            self._counted = int(self.length.sum())

    def pay_rewards(self, logp: Tensor | None = None, frozen_prefix: FrozenPrefix | None = None) -> Outcome:
        self.running_rows()  # what was sampled after a stop string is not part of the text
        self._count()
        return super().pay_rewards(logp, frozen_prefix)

    def _count(self) -> None:
        """Counts the tokens that were appended since the last look."""
        length = int(self.length.sum())
        new, self._counted = length - self._counted, length
        self.meter.spend(max(0, new))


class MeteredLearner(Learner):
    """A `Learner` whose `updates` end with the budget, however many the algorithm asks for.

    The learning rate follows the share of the budget that is spent. Set `meter` and `rollout` before training.

    Attributes:
        meter: of the environments.
        rollout: the most tokens that an update may sample; no update begins with fewer left.
    """

    meter: Meter
    rollout: int

    def updates(self, total: int) -> Iterator[int]:
        """The indices 0, 1, … of the updates that the budget allows. Updates that sample nothing end after `total`."""
        most, update = self.rollout, 0
        sampled = self.meter.left >= most  # otherwise the budget has bought what it learns from
        while self.meter.left >= most if sampled else update < total:
            self.position = update + 1
            progress = self.meter.spent / self.meter.budget if sampled else update / total
            self.lr = self.config.lr * F.schedule_factor(self.config.schedule, progress, self.config.warmup)
            before = self.meter.spent
            yield update
            sampled = self.meter.spent > before
            most = max(most, self.meter.spent - before)
            update += 1
