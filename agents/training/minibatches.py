"""Shuffled minibatches. Their position is part of the checkpoint."""

from collections.abc import Iterator

import torch
from torch import Tensor

from agents.training.stateful import State


class ShuffledMinibatches:
    """An endless iterator over minibatches of row indices, shuffled in each pass; checkpoints include its position.

    Args:
        rows: the number of rows.
        size: rows in a minibatch; the last minibatch of a pass may be smaller.
        generator: draws the order of each pass.
    """

    def __init__(self, rows: int, size: int, generator: torch.Generator):
        self.rows, self.size, self.generator = rows, size, generator
        self._order, self._at = torch.arange(rows, device=generator.device), rows

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self._at >= self.rows:
            self._order, self._at = torch.randperm(self.rows, generator=self.generator, device=self._order.device), 0
        self._at += self.size
        return self._order[self._at - self.size : self._at]

    def state(self) -> State:
        return State({"at": self._at}, {"order": self._order})

    def restore(self, state: State) -> None:
        self._at = state.count("at")
        state.copy_to({"order": self._order})
