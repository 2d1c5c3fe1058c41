"""Decoding through a transformers model's own cache, for architectures that the fused pass does not support."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    DynamicCache,
)
from transformers.cache_utils import DynamicLayer

from lmgym.models.decoding import Decoding

ONE_MASK = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Architectures in which one mask serves all layers, and nothing but attention reads it; see test_models.py."""


@dataclass
class CachedDecoding(Decoding):
    """Decoding through the model's own cache, for the architectures that `lmgym.fused` does not know.

    Attributes:
        forward_one: reads one more token through the model's own cache, which is extended in place.
        at_newest: [B, V] what the model says at the newest token.
        attention_mask: [B, S] over the cached positions.
        position: [B] the position id of the newest token.
        cache: keys and values of the S cached positions, or whatever else the model keeps.
    """

    forward_one: Callable[[Tensor, Tensor, Tensor, Any], Any]
    at_newest: Float[Tensor, "B V"]
    attention_mask: Int[Tensor, "B S"]
    position: Int[Tensor, " B"]
    cache: Any

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token."""
        return self.at_newest

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        self.attention_mask = nn.functional.pad(self.attention_mask, (0, 1), value=1)
        self.position = self.position + 1
        out = self.forward_one(token[:, None], self.attention_mask, self.position, self.cache)
        self.at_newest, self.hidden, self.cache = out.logits[:, -1], out.hidden_states[-1][:, -1], out.past_key_values

    def _park(self, live: Tensor) -> None:
        self.position = self.position * live

    def _select(self, rows: Tensor) -> "CachedDecoding | None":
        if not self._replaceable:
            return None
        cache = growing_cache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], i)
        parts = (self.at_newest[rows], self.attention_mask[rows], self.position[rows])
        return CachedDecoding(self.hidden[rows], self.forward_one, *parts, cache)

    @property
    def _replaceable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(isinstance(layer, GrowingLayer) for layer in self.cache.layers)

    def _replace_rows(self, rows: Tensor, fresh: Decoding, keep: int | None) -> None:
        assert isinstance(fresh, CachedDecoding)
        keep = self.attention_mask.shape[1] if keep is None else keep
        keep = max(keep, fresh.attention_mask.shape[1])
        missing = fresh.attention_mask.shape[1] - self.attention_mask.shape[1]
        for layer, fresh_layer in zip(self.cache.layers, fresh.cache.layers, strict=True):
            layer.replace_rows(rows, fresh_layer, keep)
        self.attention_mask = nn.functional.pad(self.attention_mask, (max(0, missing), 0))[:, -keep:].clone()
        self.attention_mask[rows] = 0
        self.attention_mask[rows, -fresh.attention_mask.shape[1] :] = fresh.attention_mask
        for name in ("at_newest", "hidden", "position"):
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(fresh, name)))


class GrowingLayer(DynamicLayer):
    """Keys and values with room to grow: a step writes one position, where transformers' own layer copies them all."""

    ROOM = 64

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        used = self.get_seq_length() if self.is_initialized else 0
        end = used + key_states.shape[-2]
        if not self.is_initialized or end > self._store[0].shape[-2]:
            self._reserve(key_states, value_states, end + self.ROOM, used)
        for store, new in zip(self._store, (key_states, value_states), strict=True):
            store[:, :, used:end] = new
        self.keys, self.values = (store[:, :, :end] for store in self._store)
        return self.keys, self.values

    def _reserve(self, keys: Tensor, values: Tensor, room: int, used: int) -> None:
        old = cast(tuple[Tensor, Tensor], (self.keys, self.values))
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self._store = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in (keys, values))
        if used:
            for store, x in zip(self._store, old, strict=True):
                store[:, :, :used] = x

    def replace_rows(self, rows: Tensor, fresh: DynamicLayer, keep: int) -> None:
        """Puts the rows of `fresh` at the right end of these rows, and drops all but the newest `keep` positions."""
        assert self.keys is not None
        assert self.values is not None
        assert fresh.keys is not None
        assert fresh.values is not None
        width, used = fresh.keys.shape[-2], min(keep, self.keys.shape[-2])
        if width > used:
            room = (width - used, 0)  # on the left, where the attention mask hides it
            self.keys, self.values = (nn.functional.pad(x, (0, 0, *room)) for x in (self.keys, self.values))
            self._reserve(self.keys, self.values, width + self.ROOM, width)
            self.keys, self.values = (store[:, :, :width] for store in self._store)
        elif used < self.keys.shape[-2]:
            self.keys, self.values = self.keys[:, :, -used:], self.values[:, :, -used:]
            self._reserve(self.keys, self.values, used + self.ROOM, used)
            self.keys, self.values = (store[:, :, :used] for store in self._store)
        self.keys[rows, :, -width:] = fresh.keys
        self.values[rows, :, -width:] = fresh.values


def growing_cache() -> DynamicCache:
    """A cache of transformers whose layers grow without copying."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache
