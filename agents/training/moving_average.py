"""An exponential moving average of the parameters over optimizer steps (Polyak averaging)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from agents.training.master_weights import MasterWeights


class MovingAverage:
    """θ_avg ← decay · θ_avg + (1 − decay) · θ after every step (Ouyang et al. 2022, https://arxiv.org/abs/2203.02155).

    Args:
        weights: θ, in float32.
        decay: the decay; if it is 0 there is no average, and all methods do nothing.
    """

    def __init__(self, weights: MasterWeights, decay: float):
        self.weights = weights
        self.decay = decay
        self.values = [p.detach().clone() for p in weights.values] if decay else []

    @torch.no_grad()
    def update(self, refused: Tensor) -> None:
        """Updates the average after a step, unless `refused`, a boolean on the device, is True."""
        if self.values:
            share = (1 - self.decay) * ~refused
            for average, parameter in zip(self.values, self.weights.values, strict=True):
                average.lerp_(parameter, share.to(parameter.dtype))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Replaces the parameters by the average while the body runs."""
        present = [p.detach().clone() for p in self.weights.values] if self.values else []
        self.copy_to_parameters()
        try:
            yield
        finally:
            self._copy(present)

    def copy_to_parameters(self) -> None:
        """Replaces the parameters by their average."""
        self._copy(self.values)

    @torch.no_grad()
    def _copy(self, values: Sequence[Tensor]) -> None:
        if values:
            for parameter, value in zip(self.weights.values, values, strict=True):
                parameter.copy_(value)
            self.weights.write()
