"""Decoding by the fused forward pass, with merged weights and a preallocated cache."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lmgym.fused import FrozenPrefix, FusedModel, Head, KVCache, Layer, ScratchMemory, mask_value, tensors_of
from lmgym.models.decoding import Decoding


@dataclass
class FusedDecoding(Decoding):
    """Decoding by `lmgym.fused`, with the adapter merged into a copy of the weights.

    Attributes:
        output_head: returns the model's output head at a temperature.
        model: the fused forward pass.
        layers: the merged weights.
        cache: keys and values.
        frozen_layers: how many layers the cache's `frozen_prefix` is the output of, if it stores one.
        scratch: memory for the logits of every step.
    """

    output_head: Callable[[float], Head]
    model: FusedModel
    layers: list[Layer]
    cache: KVCache
    frozen_layers: int = 0
    scratch: ScratchMemory = field(default_factory=ScratchMemory, repr=False)

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token, computed on access."""
        head = self.output_head(1.0)
        return nn.functional.linear(self.hidden, head.weight, head.bias)

    @property
    def frozen_prefix(self) -> FrozenPrefix | None:
        """The output of the frozen layers for the texts so far, if the cache stores it."""
        stored = self.cache.frozen_prefix
        return None if stored is None else FrozenPrefix(stored[:, : self.cache.longest], self.frozen_layers, self.model)

    def masked_logits(self, temperature: float, allowed: Bool[Tensor, "*rows V"]) -> Float[Tensor, "B V"]:
        """See `Decoding.masked_logits`. A mask that all rows share is added as the projection's bias."""
        head, low = self.output_head(temperature), mask_value(self.hidden.dtype)
        if allowed.ndim > 1:
            return head.logits(self.hidden, scratch=self.scratch).masked_fill_(~allowed, low)
        added = self.hidden.new_zeros(allowed.shape).masked_fill_(~allowed, low)
        return head.logits(self.hidden, added, self.scratch)

    def empty_static(self, rows: int, columns: int) -> "FusedDecoding":
        """An empty decoding of another size with the same weights, whose tensors never move; see `copy_rows`."""
        hidden = self.hidden.new_zeros(rows, self.hidden.shape[1])
        cache = self.cache.empty_static(rows, columns)
        return FusedDecoding(hidden, self.output_head, self.model, self.layers, cache, self.frozen_layers)

    def copy_rows(self, other: "FusedDecoding", rows: Int[Tensor, " R"]) -> None:
        """Overwrites all R rows, and the weights, in place, with these rows and the weights of another decoding."""
        self.hidden.copy_(other.hidden[rows])
        self.cache.copy_rows(other.cache, rows)
        for own, new in zip(tensors_of(self.layers), tensors_of(other.layers), strict=True):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        if self.cache.static:
            self.hidden.copy_(self.model.step(self.layers, token, self.cache, self.frozen_layers))
            return
        if self.cache.longest == self.cache.capacity:
            self.cache = self.cache.reserve(self.cache.capacity * 3 // 2 + 1)
        self.hidden = self.model.step(self.layers, token, self.cache, self.frozen_layers)

    def _rewind_ended(self, running: Tensor) -> None:
        self.cache.allow_unequal_lengths()
        self.cache.length = self.cache.length * running

    def _select(self, rows: Tensor) -> "FusedDecoding":
        cache = self.cache.select(rows)
        return FusedDecoding(self.hidden[rows], self.output_head, self.model, self.layers, cache, self.frozen_layers)

    def _replace_rows(self, rows: Tensor, fresh: Decoding, max_length: int | None) -> None:
        assert isinstance(fresh, FusedDecoding)
        self.cache = self.cache.replace_rows(rows, fresh.cache)
        if max_length is not None:  # rows that were rewound have increased `longest` beyond any row's length
            self.cache.longest = min(self.cache.longest, max(max_length, fresh.cache.longest))
        self.hidden = self.hidden.index_copy(0, rows, fresh.hidden)
