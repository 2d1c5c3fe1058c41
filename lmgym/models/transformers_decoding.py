"""Passes and decoding through the transformers model itself, for architectures that the fused pass does not support."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lmgym.models.adapters import Adapters
from lmgym.models.checkpointing import checkpointed_layers
from lmgym.models.decoding import Decoding
from lmgym.models.sequences import Sequences

SHARED_MASK_MODELS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Model types in which all layers use the same mask, and only attention reads it; tested in test_models.py."""


class TransformersPass:
    """Forward passes through a transformers model, with one of its adapters switched on.

    Args:
        adapters: the model and its adapters.
    """

    def __init__(self, adapters: Adapters):
        self.adapters = adapters
        self._takes_position_ids = "position_ids" in inspect.signature(adapters.model.forward).parameters

    def start(self, input_ids: Int[Tensor, "B P"], mask: Int[Tensor, "B P"], adapter: str | None) -> "CachedDecoding":
        """Reads left-padded prompts."""
        # By default a model would count the padding as positions: an error of 3.7 to 5 nats with absolute positions.
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        out = self._forward(
            adapter,
            input_ids.long(),
            mask,
            position_ids,
            past_key_values=growing_cache(),
            use_cache=True,
            logits_to_keep=1,
        )
        newest = (out.logits[:, -1], mask, position_ids[:, -1], out.past_key_values)
        return CachedDecoding(out.hidden_states[-1][:, -1], partial(self._step, adapter), *newest)

    def evaluate(
        self, sequences: Sequences, adapter: str | None
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T D"]]:
        """One pass over whole sequences: the logits and hidden states from which each token was chosen."""
        input_ids = torch.cat([sequences.prompt_ids, sequences.tokens[:, :-1]], 1)
        mask = torch.cat([sequences.prompt_mask, sequences.is_action[:, :-1]], 1).long()
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        steps = sequences.tokens.shape[1]
        out = self._forward(adapter, input_ids, mask, position_ids, use_cache=False, logits_to_keep=steps)
        return out.logits[:, -steps:], out.hidden_states[-1][:, -steps:]

    def _step(self, adapter: str | None, token: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Any:
        """Reads one more token [B, 1] per row, and extends the model's own cache in place."""
        return self._forward(
            adapter,
            token,
            self._step_mask(mask),
            position[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )

    def _forward(
        self, adapter: str | None, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **more: Any
    ) -> Any:
        if self._takes_position_ids:
            more["position_ids"] = position_ids
        using = partial(self.adapters.using, adapter)
        with using(), checkpointed_layers(self.adapters.model, using):
            return self.adapters.model(
                input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, return_dict=True, **more
            )

    def _step_mask(self, mask: Tensor) -> Tensor:
        """The mask for one more token: [B, 1, 1, S] where the model allows it, since transformers uses it as it is.

        A [B, S] mask is read on the host in every pass, to find out whether it is all ones.
        """
        config = self.adapters.model.config.get_text_config()
        shared = config.model_type in SHARED_MASK_MODELS and not getattr(config, "sliding_window", None)
        return mask[:, None, None].bool() if shared and config._attn_implementation == "sdpa" else mask


@dataclass
class CachedDecoding(Decoding):
    """Decoding through the model's own cache.

    Attributes:
        step: reads one more token: takes token [B, 1], mask, position and cache; the cache is extended in place.
        newest_logits: [B, V] the logits at the newest token.
        attention_mask: [B, S] over the cached positions.
        position: [B] the position id of the newest token.
        cache: keys and values of the S cached positions, or another state of the model.
    """

    step: Callable[[Tensor, Tensor, Tensor, Any], Any]
    newest_logits: Float[Tensor, "B V"]
    attention_mask: Int[Tensor, "B S"]
    position: Int[Tensor, " B"]
    cache: Any

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token."""
        return self.newest_logits

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        self.attention_mask = nn.functional.pad(self.attention_mask, (0, 1), value=1)
        self.position = self.position + 1
        out = self.step(token[:, None], self.attention_mask, self.position, self.cache)
        self.newest_logits, self.hidden = out.logits[:, -1], out.hidden_states[-1][:, -1]
        self.cache = out.past_key_values

    def _rewind_ended(self, running: Tensor) -> None:
        self.position = self.position * running

    def _select(self, rows: Tensor) -> "CachedDecoding | None":
        if not self._replaceable:
            return None
        cache = growing_cache()
        for i, layer in enumerate(self.cache.layers):
            cache.update(layer.keys[rows], layer.values[rows], i)
        parts = (self.newest_logits[rows], self.attention_mask[rows], self.position[rows])
        return CachedDecoding(self.hidden[rows], self.step, *parts, cache)

    @property
    def _replaceable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(isinstance(layer, GrowingLayer) for layer in self.cache.layers)

    def _replace_rows(self, rows: Tensor, fresh: Decoding, max_length: int | None) -> None:
        assert isinstance(fresh, CachedDecoding)
        width = fresh.attention_mask.shape[1]
        kept = max(self.attention_mask.shape[1] if max_length is None else max_length, width)
        missing = width - self.attention_mask.shape[1]
        for layer, fresh_layer in zip(self.cache.layers, fresh.cache.layers, strict=True):
            layer.replace_rows(rows, fresh_layer, kept)
        self.attention_mask = nn.functional.pad(self.attention_mask, (max(0, missing), 0))[:, -kept:].clone()
        self.attention_mask[rows] = 0
        self.attention_mask[rows, -width:] = fresh.attention_mask
        for name in ("newest_logits", "hidden", "position"):
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(fresh, name)))


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


def growing_cache() -> DynamicCache:
    """A cache of transformers whose layers grow without copying."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = GrowingLayer
    return cache
