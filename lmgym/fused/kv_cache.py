"""The KV cache: keys and values of the positions read so far, preallocated and left-aligned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmgym.devices import free_to_look


@dataclass
class Cache:
    """Keys and values of texts that stand at the left: column c holds position c.

    Attributes:
        layers: for each layer [2, B, H_kv, S, head], keys and values.
        length: [B] how many columns of each row are filled.
        longest: at least the largest length, known without asking the device.
        equal: whether all lengths are known to be equal, so that no mask is needed.
        frozen_prefix: [B, S, D] what goes into the lowest layer with an adapter, where it is to be kept.
        fixed: whether nothing in it ever moves: a step then is the same operations each time, over all S columns, and
            `longest` is moved on by the caller.
    """

    layers: list[Float[Tensor, "2 B K S H"]]
    length: Int[Tensor, " B"]
    longest: int
    equal: bool
    frozen_prefix: Float[Tensor, "B S D"] | None = None
    fixed: bool = False

    @property
    def capacity(self) -> int:
        """S, the columns that there is room for."""
        return self.layers[0].shape[3]

    def parts(self) -> Iterator[tuple[Tensor, int]]:
        """[B, …] all that is kept for each position, and the dimension along which positions lie."""
        for layer in self.layers:
            yield from ((layer[0], 2), (layer[1], 2))
        if self.frozen_prefix is not None:
            yield self.frozen_prefix, 1

    def like(self, rows: int, columns: int, length: Tensor) -> "Cache":
        """An empty cache of another size."""

        def empty(x: Tensor, *shape: int) -> Tensor:
            # A masked column must hold numbers: 0 times what memory happened to hold may be none. Without a mask
            # nothing is read before it is written.
            return x.new_empty(shape) if self.equal else x.new_zeros(shape)

        layers = [empty(x, 2, rows, x.shape[2], columns, x.shape[4]) for x in self.layers]
        frozen_prefix = (
            None
            if self.frozen_prefix is None
            else empty(self.frozen_prefix, rows, columns, self.frozen_prefix.shape[2])
        )
        return Cache(layers, length, self.longest, self.equal, frozen_prefix)

    def select(self, rows: Int[Tensor, " R"]) -> "Cache":
        """These rows, in this order, as often as they are named."""
        chosen = self.like(len(rows), self.capacity, self.length[rows])
        for (new, at), (old, _) in zip(chosen.parts(), self.parts(), strict=True):
            torch.index_select(old.narrow(at, 0, self.longest), 0, rows, out=new.narrow(at, 0, self.longest))
        return chosen._looked_at()

    def still(self, rows: int, columns: int) -> "Cache":
        """An empty cache of another size in which nothing ever moves; see `fill`."""
        return replace(replace(self, equal=False).like(rows, columns, self.length.new_zeros(rows)), fixed=True)

    def fill(self, other: "Cache", rows: Int[Tensor, " R"]) -> None:
        """Takes over rows of another cache, in place."""
        self.length.copy_(other.length[rows])
        self.longest = other.longest
        for (own, at), (theirs, _) in zip(self.parts(), other.parts(), strict=True):
            own.narrow(at, 0, other.longest).copy_(theirs.narrow(at, 0, other.longest)[rows])

    def reserve(self, columns: int) -> "Cache":
        """Room for more columns, where there is not."""
        if columns <= self.capacity:
            return self
        wide = self.like(len(self.length), columns, self.length)
        for (new, at), (old, _) in zip(wide.parts(), self.parts(), strict=True):
            new.narrow(at, 0, self.longest).copy_(old.narrow(at, 0, self.longest))
        return wide

    def put(self, rows: Int[Tensor, " R"], fresh: "Cache") -> "Cache":
        """Other texts in some rows."""
        wide = self.reserve(fresh.longest)
        wide.loosen()
        for (own, at), (other, _) in zip(wide.parts(), fresh.parts(), strict=True):
            own.narrow(at, 0, fresh.longest)[rows] = other.narrow(at, 0, fresh.longest)
        wide.length = wide.length.index_copy(0, rows, fresh.length)
        wide.longest = max(self.longest, fresh.longest)
        return wide._looked_at()

    def loosen(self) -> None:
        """Lets lengths differ from now on."""
        if self.equal:
            for part, at in self.parts():
                part.narrow(at, self.longest, self.capacity - self.longest).zero_()
        self.equal = False

    def _looked_at(self) -> "Cache":
        """With the longest length as it is, where looking at it waits for nobody."""
        if free_to_look(self.length.device):
            self.longest = int(self.length.max())
            self.equal = self.longest == int(self.length.min())
        return self
