"""Converts Adam's moments to tensors of a checkpoint and back."""

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.training.stateful import State


def moments_as_tensors(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The moments of each parameter by name. A parameter has no moments before its first step."""
    moments = [optimizer.state.get(p, {}) for p in parameters]
    return {f"optimizer/{i:04}/{key}": t for i, of in enumerate(moments) for key, t in of.items()}


def take_moments(tensors: dict[str, Tensor], parameters: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Copies of the moments of each parameter. It removes them from `tensors`.

    Raises:
        ValueError: a name, shape or dtype does not match Adam's moments.
    """
    return [_moments_of(i, parameter, tensors) for i, parameter in enumerate(parameters)]


def _moments_of(number: int, parameter: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"optimizer/{number:04}/"
    found = {name.removeprefix(start): tensors.pop(name) for name in list(tensors) if name.startswith(start)}
    step = torch.zeros((), device=parameter.device)
    like = {"step": step, "exp_avg": parameter.detach(), "exp_avg_sq": parameter.detach()} if found else {}
    fresh = {name: torch.empty_like(t) for name, t in like.items()}
    State({}, found).copy_to(fresh)
    return fresh
