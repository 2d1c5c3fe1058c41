"""What a run keeps beside the learner: the best parameters so far, and the state of the KL controller."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from agents.training import State
from lmgym.reward import KLController


class Best:
    """A copy of the parameters after the update with the most of a metric.

    Attributes:
        kept: the copies; empty before the first update.
        value: the metric's.
        update: how many updates there were.
    """

    def __init__(self, metric: str, parameters: Sequence[Tensor]):
        self.metric, self.parameters = metric, parameters
        self.kept: list[Tensor] = []
        self.value, self.update, self._seen = -math.inf, 0, 0

    def look(self, row: Mapping[str, float]) -> None:
        """Keeps the parameters if this update is the best so far."""
        self._seen += 1
        value = row.get(self.metric, -math.inf)
        if value > self.value:
            self.value, self.update = value, self._seen
            self.kept = [p.detach().clone() for p in self.parameters]

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Runs the body with the best parameters in the place of the present ones."""
        now = [p.detach().clone() for p in self.parameters]
        self._put(self.kept)
        try:
            yield
        finally:
            self._put(now)

    @torch.no_grad()
    def _put(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state(self) -> State:
        value = self.value if self.kept else None
        return State(
            {"value": value, "update": self.update, "seen": self._seen, "kept": bool(self.kept)},
            {f"{i:04}": t for i, t in enumerate(self.kept)},
        )

    def restore(self, state: State) -> None:
        self._seen = state.count("seen")
        if state.data.get("kept"):
            kept = [torch.empty_like(p) for p in self.parameters]
            state.copy_to({f"{i:04}": t for i, t in enumerate(kept)})
            self.kept, self.value, self.update = kept, float(state.number("value")), state.count("update")


class ControllerState:
    """The numbers of a KL controller in a checkpoint."""

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
