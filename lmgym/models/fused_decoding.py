"""Decoding by the fused forward pass, over merged weights and a preallocated cache."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmgym.fused import Cache, Head, Layer, Room, Trunk, lowest, tensors_of
from lmgym.fused.frozen_prefix import FrozenPrefix
from lmgym.models.decoding import Decoding


@dataclass
class FusedDecoding(Decoding):
    """Decoding by `lmgym.fused`, with adapters merged into a copy of the weights.

    Attributes:
        output_head: the model's last projection at a temperature.
        trunk: the functions.
        layers: the merged weights.
        cache: keys and values.
        keep: the layer whose input the cache keeps, where it keeps one.
        room: memory for the logits of every step.
    """

    output_head: Callable[[float], Head]
    trunk: Trunk
    layers: list[Layer]
    cache: Cache
    keep: int = 0
    room: Room = field(default_factory=Room, repr=False)

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token, computed when asked for."""
        head = self.output_head(1.0)
        return nn.functional.linear(self.hidden, head.weight, head.bias)

    @property
    def frozen_prefix(self) -> FrozenPrefix | None:
        """What the layers below the adapter made of the texts so far, where it is kept."""
        kept = self.cache.frozen_prefix
        return None if kept is None else FrozenPrefix(kept[:, : self.cache.longest], self.keep, self.trunk)

    def masked_logits(self, temperature: float, allowed: Bool[Tensor, "*rows V"]) -> Float[Tensor, "B V"]:
        """As above; a mask that all rows share goes in with the projection."""
        head, low = self.output_head(temperature), lowest(self.hidden.dtype)
        if allowed.ndim > 1:
            return head.logits(self.hidden, room=self.room).masked_fill_(~allowed, low)
        added = self.hidden.new_zeros(allowed.shape).masked_fill_(~allowed, low)
        return head.logits(self.hidden, added, self.room)

    def still(self, rows: int, columns: int) -> "FusedDecoding":
        """A decoding of another size, over the same weights, in which nothing ever moves; see `fill`."""
        hidden = self.hidden.new_zeros(rows, self.hidden.shape[1])
        return FusedDecoding(
            hidden, self.output_head, self.trunk, self.layers, self.cache.still(rows, columns), self.keep
        )

    def fill(self, other: "FusedDecoding", rows: Int[Tensor, " R"]) -> None:
        """Takes over rows of another decoding and its weights, in place."""
        self.hidden.copy_(other.hidden[rows])
        self.cache.fill(other.cache, rows)
        for own, new in zip(tensors_of(self.layers), tensors_of(other.layers), strict=True):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        if self.cache.fixed:
            self.hidden.copy_(self.trunk.step(self.layers, token, self.cache, self.keep))
            return
        if self.cache.longest == self.cache.capacity:
            self.cache = self.cache.reserve(self.cache.capacity * 3 // 2 + 1)
        self.hidden = self.trunk.step(self.layers, token, self.cache, self.keep)

    def _park(self, live: Tensor) -> None:
        self.cache.loosen()
        self.cache.length = self.cache.length * live

    def _select(self, rows: Tensor) -> "FusedDecoding":
        kept = self.cache.select(rows)
        return FusedDecoding(self.hidden[rows], self.output_head, self.trunk, self.layers, kept, self.keep)

    def _replace_rows(self, rows: Tensor, fresh: Decoding, keep: int | None) -> None:
        assert isinstance(fresh, FusedDecoding)
        self.cache = self.cache.put(rows, fresh.cache)
        if keep is not None:  # rows that were parked have moved `longest` on for nothing
            self.cache.longest = min(self.cache.longest, max(keep, fresh.cache.longest))
        self.hidden = self.hidden.index_copy(0, rows, fresh.hidden)
