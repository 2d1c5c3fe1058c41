"""The KV cache: keys and values of the positions read so far, preallocated and left-aligned."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmgym.devices import host_reads_are_free


@dataclass
class KVCache:
    """Keys and values of left-aligned texts: column c holds position c.

    Attributes:
        layers: for each layer [2, B, H_kv, S, head_size], keys and values.
        length: [B] how many columns of each row are filled.
        longest: an upper bound of the lengths, known without reading from the device.
        equal_lengths: whether all lengths are known to be equal, so that no mask is needed.
        frozen_prefix: [B, S, D] the output of the frozen layers; None if it is not stored.
        static: whether its tensors never move. A step then consists of the same operations each time, over all S
            columns, and the caller increases `longest`.
    """

    layers: list[Float[Tensor, "2 B K S H"]]
    length: Int[Tensor, " B"]
    longest: int
    equal_lengths: bool
    frozen_prefix: Float[Tensor, "B S D"] | None = None
    static: bool = False

    @property
    def capacity(self) -> int:
        """S, the number of columns allocated."""
        return self.layers[0].shape[3]

    def parts(self) -> Iterator[tuple[Tensor, int]]:
        """All tensors [B, …] with one entry per position, each with the dimension of the positions."""
        for layer in self.layers:
            yield from ((layer[0], 2), (layer[1], 2))
        if self.frozen_prefix is not None:
            yield self.frozen_prefix, 1

    def empty_like(self, rows: int, columns: int, length: Tensor) -> "KVCache":
        """An empty cache of another size."""

        def empty(x: Tensor, *shape: int) -> Tensor:
            # A masked column is multiplied by 0, so it must be finite: uninitialised memory may hold NaN. Without a
            # mask, no column is read before it is written.
            return x.new_empty(shape) if self.equal_lengths else x.new_zeros(shape)

        layers = [empty(x, 2, rows, x.shape[2], columns, x.shape[4]) for x in self.layers]
        frozen_prefix = (
            None
            if self.frozen_prefix is None
            else empty(self.frozen_prefix, rows, columns, self.frozen_prefix.shape[2])
        )
        return KVCache(layers, length, self.longest, self.equal_lengths, frozen_prefix)

    def empty_static(self, rows: int, columns: int) -> "KVCache":
        """An empty cache of another size whose tensors never move; see `copy_rows`."""
        cache = replace(self, equal_lengths=False).empty_like(rows, columns, self.length.new_zeros(rows))
        return replace(cache, static=True)

    def select(self, rows: Int[Tensor, " R"]) -> "KVCache":
        """A new cache of these rows, in this order; a row may occur several times."""
        chosen = self.empty_like(len(rows), self.capacity, self.length[rows])
        for (new, dim), (old, _) in zip(chosen.parts(), self.parts(), strict=True):
            torch.index_select(old.narrow(dim, 0, self.longest), 0, rows, out=new.narrow(dim, 0, self.longest))
        return chosen._read_lengths()

    def copy_rows(self, other: "KVCache", rows: Int[Tensor, " R"]) -> None:
        """Overwrites all R rows, in place, with these rows of another cache."""
        self.length.copy_(other.length[rows])
        self.longest = other.longest
        for (own, dim), (theirs, _) in zip(self.parts(), other.parts(), strict=True):
            own.narrow(dim, 0, other.longest).copy_(theirs.narrow(dim, 0, other.longest)[rows])

    def reserve(self, columns: int) -> "KVCache":
        """A cache with at least this many columns: this one, or a larger copy."""
        if columns <= self.capacity:
            return self
        larger = self.empty_like(len(self.length), columns, self.length)
        for (new, dim), (old, _) in zip(larger.parts(), self.parts(), strict=True):
            new.narrow(dim, 0, self.longest).copy_(old.narrow(dim, 0, self.longest))
        return larger

    def replace_rows(self, rows: Int[Tensor, " R"], fresh: "KVCache") -> "KVCache":
        """Replaces some rows by those of `fresh`, in place if there is space."""
        cache = self.reserve(fresh.longest)
        cache.allow_unequal_lengths()
        for (own, dim), (other, _) in zip(cache.parts(), fresh.parts(), strict=True):
            own.narrow(dim, 0, fresh.longest)[rows] = other.narrow(dim, 0, fresh.longest)
        cache.length = cache.length.index_copy(0, rows, fresh.length)
        cache.longest = max(self.longest, fresh.longest)
        return cache._read_lengths()

    def allow_unequal_lengths(self) -> None:
        """Prepares for rows of different lengths, which are masked from now on."""
        if self.equal_lengths:
            for part, dim in self.parts():
                part.narrow(dim, self.longest, self.capacity - self.longest).zero_()
        self.equal_lengths = False

    def _read_lengths(self) -> "KVCache":
        """Makes `longest` and `equal_lengths` exact, if reading the lengths needs no synchronisation."""
        if host_reads_are_free(self.length.device):
            self.longest = int(self.length.max())
            self.equal_lengths = self.longest == int(self.length.min())
        return self
