"""What the RL stage saves besides the learner: the best parameters so far, and the state of the KL controller."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from agents.training import State
from lmgym.reward import KLController


class BestParameters:
    """A copy of the parameters after the update with the highest value of a metric.

    Args:
        metric: its name.
        parameters: what is trained.

    Attributes:
        copies: the parameters after that update; empty before the first update that measures the metric.
        value: the metric's value then.
        number: the number of that update, from 1.
    """

    def __init__(self, metric: str, parameters: Sequence[Tensor]):
        self.metric, self.parameters = metric, parameters
        self.copies: list[Tensor] = []
        self.value, self.number, self._updates = -math.inf, 0, 0

    def update(self, row: Mapping[str, float]) -> None:
        """Copies the parameters if this update is the best so far."""
        self._updates += 1
        value = row.get(self.metric, -math.inf)
        if value > self.value:
            self.value, self.number = value, self._updates
            self.copies = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Runs the body with the best parameters, then restores the present ones."""
        present = [p.detach().clone() for p in self.parameters]
        self._set(self.copies)
        try:
            yield
        finally:
            self._set(present)

    @torch.no_grad()
    def _set(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state(self) -> State:
        value = self.value if self.copies else None
        return State(
            {"value": value, "number": self.number, "updates": self._updates},
            {f"{i:04}": t for i, t in enumerate(self.copies)},
        )

    def restore(self, state: State) -> None:
        self._updates = state.count("updates")
        if state.tensors:
            copies = [torch.empty_like(p) for p in self.parameters]
            state.copy_to({f"{i:04}": t for i, t in enumerate(copies)})
            self.copies, self.value, self.number = copies, float(state.number("value")), state.count("number")


class ControllerState:
    """The numbers of a KL controller, as part of a checkpoint."""

    def __init__(self, controller: KLController):
        self.controller = controller

    def _numbers(self) -> dict[str, float]:
        return {
            k: v for k, v in vars(self.controller).items() if isinstance(v, (int, float)) and not isinstance(v, bool)
        }

    def state(self) -> State:
        return State(self._numbers())

    def restore(self, state: State) -> None:
        for name in self._numbers():
            setattr(self.controller, name, state.number(name))
