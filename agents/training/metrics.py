"""Masked means over an update, accumulated on the device."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lmgym.ranks import current, gather_data


class Metrics:
    """Masked means over an update. They stay on the device until they are read, so adding needs no synchronisation.

    If a run has several ranks, each of them adds the same values, but for those that are added in `of_own_rows`: these
    are added up over the ranks when they are read.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
        self._open: dict[str, Tensor] = {}
        self._own: Metrics | None = None

    @contextmanager
    def of_own_rows(self) -> Iterator[None]:
        """In the body, what is added comes from this rank's share of the rows. With a single rank, from all rows."""
        if current().world == 1:
            yield
            return
        all_rows, own = self.copy(), self._own or Metrics()
        self.put_back(own)
        try:
            yield
        finally:
            self._own = self.copy()
            self.put_back(all_rows)

    def add_to_sum(self, name: str, value: Tensor) -> None:
        """Adds a part to a sum. `end_sum` then adds the whole sum to the mean of `name` as one value."""
        self._open[name] = self._open.get(name, torch.zeros((), device=value.device)) + value.detach().float()

    def end_sum(self, name: str) -> None:
        """Adds the sum of the parts to the mean of `name`, as one value."""
        if self._own is None or name in self._open:
            self.add(name, self._open.pop(name))
            return
        # One value in all, so that rank 0 alone counts it; a rank without rows has no part of it.
        ranks, part = current(), self._own._open.pop(name, torch.zeros(()))
        self._own.add(name, part)
        if ranks.rank > 0:
            self._own._counts[name] = self._own._counts[name] - 1

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
        if self._own is not None:
            return self._over_ranks([name])[name]
        return float(self._sums[name] / self._counts[name].clamp(min=1))

    def drain(self) -> dict[str, float]:
        """Returns all means, in one transfer from the device, and resets them. An open sum counts as one value."""
        for name in [*self._open, *(self._own._open if self._own else ())]:
            self.end_sum(name)
        if self._own is not None:
            means = self._over_ranks({**self._sums, **self._own._sums})
            self._sums, self._counts, self._own = {}, {}, None
            return means
        if not self._sums:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[n] / self._counts[n].clamp(min=1) for n in names]).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, means, strict=True))

    def _over_ranks(self, names: Iterable[str]) -> dict[str, float]:
        """The means of those of the names that any rank has, over the rows of all ranks, in one exchange."""
        assert self._own is not None
        own = {n: [float(self._own._sums[n]), int(self._own._counts[n])] for n in names if n in self._own._sums}
        totals = {n: [float(self._sums[n]), int(self._counts[n])] for n in names if n in self._sums}
        for part in gather_data(own):
            for name, (total, count) in part.items():
                before = totals.get(name, [0.0, 0])
                totals[name] = [before[0] + total, before[1] + count]
        return {name: total / max(1, count) for name, (total, count) in totals.items()}
