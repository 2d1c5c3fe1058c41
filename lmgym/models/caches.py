"""Caches for decoding through transformers: keys and values that grow without copying, and states of other layers."""

import copy
from typing import Any, cast

from jaxtyping import Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer


class GrowingLayer(DynamicLayer):
    """Keys and values with spare columns: a step writes one position, while transformers' own layer copies all."""

    SPARE = 64
    """The number of spare columns in a new allocation."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        used = self.get_seq_length() if self.is_initialized else 0
        end = used + key_states.shape[-2]
        if not self.is_initialized or end > self._store[0].shape[-2]:
            self._reserve(key_states, value_states, end + self.SPARE, used)
        for store, new in zip(self._store, (key_states, value_states), strict=True):
            store[:, :, used:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._store)
        return self.keys, self.values

    def _reserve(self, keys: Tensor, values: Tensor, columns: int, used: int) -> None:
        old = cast(tuple[Tensor, Tensor], (self.keys, self.values))
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._store = tuple(x.new_empty(*x.shape[:2], columns, x.shape[3]) for x in (keys, values))
        if used:
            for store, x in zip(self._store, old, strict=True):
                store[:, :, :used] = x

    def replace_rows(self, rows: Tensor, fresh: DynamicLayer, max_length: int) -> None:
        """Writes the rows of `fresh` at the right edge of these rows, and drops all but the newest positions."""
        assert self.keys is not None
        assert self.values is not None
        assert fresh.keys is not None
        assert fresh.values is not None
        width, used = fresh.keys.shape[-2], min(max_length, self.keys.shape[-2])
        if width > used:
            padding = (width - used, 0)  # on the left, hidden by the attention mask
            self.keys, self.values = (nn.functional.pad(x, (0, 0, *padding)) for x in (self.keys, self.values))
            self._reserve(self.keys, self.values, width + self.SPARE, width)
            self.keys, self.values = (store[:, :, :width] for store in self._store)
        elif used < self.keys.shape[-2]:
            self.keys, self.values = self.keys[:, :, -used:], self.values[:, :, -used:]
            self._reserve(self.keys, self.values, used + self.SPARE, used)
            self.keys, self.values = (store[:, :, :used] for store in self._store)
        self.keys[rows, :, -width:] = fresh.keys
        self.values[rows, :, -width:] = fresh.values


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for the layers of a model.

    Layers with a sliding window keep all positions, and the model's mask hides those before the window: so rows can be
    restarted. Layers with another state (convolution, linear attention) get the layer that transformers has for them.
    """
    made = DynamicCache(config=config)
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in made.layers):
        cache = DynamicCache()
        cache.layer_class_to_replicate = GrowingLayer
        return cache
    made.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in made.layers]
    return made


def can_replace_rows(cache: Any) -> bool:
    """Whether single rows of a cache can start anew: only keys and values can."""
    return all(isinstance(layer, GrowingLayer) for layer in cache.layers)


def can_select_rows(cache: Any) -> bool:
    """Whether `select_rows` supports all layers of a cache."""
    return all(isinstance(layer, GrowingLayer | LinearAttentionLayer) for layer in cache.layers)


def select_rows(cache: Any, rows: Int[Tensor, " R"]) -> Any:
    """A new cache with these rows, in this order; a row may occur several times."""
    chosen = copy.copy(cache)
    chosen.layers = [_select_rows(layer, rows) for layer in cache.layers]
    return chosen


def _select_rows(layer: Any, rows: Tensor) -> Any:
    if isinstance(layer, GrowingLayer):
        chosen = GrowingLayer()
        if layer.is_initialized:
            chosen.update(cast(Tensor, layer.keys)[rows], cast(Tensor, layer.values)[rows])
        return chosen
    chosen = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # a layer keeps its states by number
            setattr(chosen, name, dict(value))
    chosen.reorder_cache(rows)
    return chosen
