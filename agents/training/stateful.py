"""The state in a checkpoint, plain data and tensors, and the protocol of objects that have such a state."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """All that an object needs to continue exactly where it stopped.

    Attributes:
        data: plain data that JSON can represent.
        tensors: tensors by name.
    """

    data: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: "Mapping[str, State]") -> "State":
        """Combines several states into one."""
        tensors = {f"{name}/{key}": t for name, part in parts.items() for key, t in part.tensors.items()}
        return cls({name: part.data for name, part in parts.items()}, tensors)

    def part(self, name: str) -> "State":
        """One of the states that `of` combined.

        Raises:
            ValueError: there is no state of that name.
        """
        data = self.data.get(name)
        if not isinstance(data, dict):
            raise ValueError(f"the checkpoint has no state of {name!r}: it belongs to another program")
        start = f"{name}/"
        return State(data, {key.removeprefix(start): t for key, t in self.tensors.items() if key.startswith(start)})

    def number(self, name: str, least: float = -math.inf) -> float | int:
        """A number of `data`.

        Raises:
            ValueError: it is missing, not a finite number, or less than `least`.
        """
        value = self.data.get(name)
        # Not isfinite(), which raises for a very large integer.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not max(least, -1e300) <= value < 1e300:
            raise ValueError(f"the checkpoint's {name!r} is {value!r}, but should be a number")
        return value

    def count(self, name: str) -> int:
        """A non-negative integer of `data`; raises as `number` does."""
        value = self.number(name, 0.0)
        if not isinstance(value, int):
            raise ValueError(f"the checkpoint's {name!r} is {value!r}, but should be an integer")
        return value

    @torch.no_grad()
    def copy_to(self, targets: Mapping[str, Tensor]) -> None:
        """Copies each tensor to the target of the same name, after all have been checked.

        Raises:
            ValueError: a name, shape or dtype differs; nothing was copied.
        """
        if set(self.tensors) != set(targets):
            odd = sorted(set(self.tensors) ^ set(targets))[0]
            raise ValueError(f"the checkpoint does not fit the object it is loaded into: only one of them has {odd!r}")
        for name, target in targets.items():
            found = self.tensors[name]
            if found.shape != target.shape or found.dtype != target.dtype:
                have, want = ([tuple(t.shape), str(t.dtype)] for t in (found, target))
                raise ValueError(f"the checkpoint's {name!r} is {have}, but should be {want}")
        for name, target in targets.items():
            target.copy_(self.tensors[name])


@runtime_checkable
class Stateful(Protocol):
    """An object whose state a checkpoint can hold."""

    def state(self) -> State: ...
    def restore(self, state: State) -> None: ...
