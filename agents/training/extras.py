"""Additions to an algorithm that come from other papers: reference refresh and score scaling."""

from collections.abc import Callable

import torch
from torch import Tensor

from agents.training.stateful import State
from lmgym.models import LanguageModel


class AdapterCopy:
    """A frozen copy of an adapter, which an algorithm makes anew now and then, and which a checkpoint holds.

    Args:
        lm: the model of both.
        source: the adapter that is copied.
        name: of the copy.
        then: is given the copy's name whenever it has changed, such as `env.set_reference`.
    """

    def __init__(self, lm: LanguageModel, source: str, name: str, then: Callable[[str], object] = lambda name: None):
        self.lm, self.source, self.name, self.then = lm, source, name, then
        self._made = False

    def renew(self) -> None:
        """Makes the copy what its source is now."""
        self.lm.adapters.copy(self.source, self.name)
        self._made = True
        self.then(self.name)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{i:04}": p for i, p in enumerate(self.lm.adapters.parameters(self.name))} if self._made else {}

    def state(self) -> State:
        return State({"made": self._made}, self._tensors())

    def restore(self, state: State) -> None:
        if state.data.get("made"):
            self.renew()
        state.copy_to(self._tensors())


class RunningScale:
    """The standard deviation of all numbers seen so far (Chan et al. 1979), to scale scores by; on their device."""

    def __init__(self) -> None:
        self._count, self._mean, self._squares = torch.zeros(()), torch.zeros(()), torch.zeros(())

    def update(self, x: Tensor) -> Tensor:
        """Takes in more numbers, those that are finite; returns the standard deviation, 1 until there is one."""
        known = x.isfinite()
        count, before = known.sum(), self._mean.to(x.device)
        self._count = self._count.to(x.device) + count
        mean = torch.where(known, x, 0.0).sum() / count.clamp(min=1)
        share = count / self._count.clamp(min=1)
        gap = mean - before
        spread = torch.where(known, x - mean, 0.0).square().sum()
        self._squares = self._squares.to(x.device) + spread + gap.square() * (self._count - count) * share
        self._mean = before + gap * share
        deviation = (self._squares / (self._count - 1).clamp(min=1)).sqrt()
        return torch.where(deviation > 0, deviation, 1.0)

    def state(self) -> State:
        return State({}, {"count": self._count, "mean": self._mean, "squares": self._squares})

    def restore(self, state: State) -> None:
        state.copy_to({"count": self._count, "mean": self._mean, "squares": self._squares})
