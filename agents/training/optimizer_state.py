"""The optimizer's groups of parameters, and Adam's moments as tensors of a checkpoint and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from agents.training.stateful import State


def groups_by_lr(
    parameters: Sequence[nn.Parameter], values: Sequence[Tensor], lr: float, factors: Mapping[nn.Parameter, float]
) -> list[dict[str, Any]]:
    """One group of the optimizer for each learning rate; "factor" is the group's rate as a multiple of `lr`.

    Args:
        parameters: what is trained.
        values: what the optimizer steps in their place.
        lr: the learning rate of parameters that have no factor.
        factors: the other ones' factors.
    """
    groups: dict[float, list[Tensor]] = {}
    for parameter, value in zip(parameters, values, strict=True):
        groups.setdefault(factors.get(parameter, 1.0), []).append(value)
    return [{"params": those, "lr": lr * factor, "factor": factor} for factor, those in groups.items()]


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
