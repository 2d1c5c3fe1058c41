"""Masked means over an update, accumulated on the device."""

import torch
from torch import Tensor


class Metrics:
    """Masked means over an update. They stay on the device until they are read, so adding needs no synchronisation."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._open: dict[str, Tensor] = {}

    def add_to_sum(self, name: str, value: Tensor) -> None:
        """Adds a part to a sum. `end_sum` then adds the whole sum to the mean of `name` as one value."""
        self._open[name] = self._open.get(name, torch.zeros((), device=value.device)) + value.detach().float()

    def end_sum(self, name: str) -> None:
        """Adds the sum of the parts to the mean of `name`, as one value."""
        self.add(name, self._open.pop(name))

    def add(self, name: str, value: Tensor, mask: Tensor | None = None) -> None:
        """Adds the values at entries where `mask` is True to the mean of `name`."""
        value = value.detach().float()
        mask = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
        total, count = torch.where(mask, value, 0.0).sum(), mask.sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def copy(self) -> "Metrics":
        """A copy of what was added so far, for `put_back`."""
        copied = Metrics()
        copied._sums, copied._counts, copied._open = dict(self._sums), dict(self._counts), dict(self._open)
        return copied

    def put_back(self, kept: "Metrics") -> None:
        """Restores the state of a copy: removes what was added after it was made."""
        self._sums, self._counts, self._open = kept._sums, kept._counts, kept._open

    def mean(self, name: str) -> float:
        """The mean of one metric so far. Synchronises with the device."""
        return float(self._sums[name] / self._counts[name].clamp(min=1))

    def drain(self) -> dict[str, float]:
        """Returns all means, in one transfer from the device, and resets them. An open sum counts as one value."""
        for name in list(self._open):
            self.end_sum(name)
        if not self._sums:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[n] / self._counts[n].clamp(min=1) for n in names]).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, means, strict=True))
