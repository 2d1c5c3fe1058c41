"""Passes and decoding through the transformers model itself, for architectures that the fused pass does not support."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lmgym.fused import gather_positions
from lmgym.models.adapters import Adapters
from lmgym.models.caches import can_replace_rows, can_select_rows, new_cache, select_rows
from lmgym.models.checkpointing import checkpointed_layers
from lmgym.models.decoding import Decoding
from lmgym.models.sequences import Sequences, left_align
from lmgym.models.transformers_quirks import keep_evaluating

SHARED_MASK_MODELS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")
"""Model types in which all layers use the same mask, and only attention reads it; tested in test_models.py."""

CACHE_ARGUMENTS = ("past_key_values", "cache_params")
"""The names under which models take and return their cache."""


class TransformersPass:
    """Forward passes through a transformers model, with one of its adapters switched on.

    Whole texts are left-aligned and have no mask: in a causal model, whatever follows a text does not affect it. So
    these passes are exact for every causal model, whatever it does with masks and positions. Decoding with a cache
    needs left-padded rows, which not all models support; `lmgym.models.probe` finds out.

    Args:
        adapters: the model and its adapters.

    Attributes:
        cached: whether decoding uses the model's cache; otherwise every step reads the whole text again.
    """

    def __init__(self, adapters: Adapters):
        self.adapters = adapters
        self.cached = True
        taken = inspect.signature(adapters.model.forward).parameters
        self._takes_position_ids = "position_ids" in taken
        self._cache_argument = next((name for name in CACHE_ARGUMENTS if name in taken), CACHE_ARGUMENTS[0])

    def start(self, input_ids: Int[Tensor, "B P"], mask: Int[Tensor, "B P"], adapter: str | None) -> Decoding:
        """Reads left-padded prompts."""
        if not self.cached:
            ids, length, longest, _ = left_align(input_ids, mask)
            return RecomputedDecoding.of(partial(self.read, adapter), ids[:, :longest], length)
        # By default a model would count the padding as positions: an error of 3.7 to 5 nats with absolute positions.
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = new_cache(self.adapters.model.config)
        logits, hidden, cache = self._forward(adapter, input_ids.long(), mask, position_ids, cache)
        step, restarts = partial(self._step, adapter), self._takes_position_ids
        return CachedDecoding(hidden, step, logits, mask, position_ids[:, -1], cache, restarts)

    def evaluate(
        self, sequences: Sequences, adapter: str | None
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T D"]]:
        """One pass over whole sequences: the logits and hidden states from which each token was chosen."""
        return self.read(adapter, *sequences.left_aligned())

    def read(
        self, adapter: str | None, ids: Int[Tensor, "B L"], positions: Int[Tensor, "B T"] | slice
    ) -> tuple[Float[Tensor, "B T V"], Float[Tensor, "B T D"]]:
        """One pass over whole, left-aligned texts: logits and hidden states at some positions."""
        out, hidden = self._run(adapter, positions, input_ids=ids, use_cache=False)
        return out.logits, hidden

    def _step(self, adapter: str | None, token: Tensor, mask: Tensor, position: Tensor, cache: Any) -> Any:
        """Reads one more token [B, 1] per row, and extends the model's own cache in place."""
        # A state that is not a list of positions takes no mask of them: the padding is not in it.
        step_mask = self._step_mask(mask) if self._cache_argument == CACHE_ARGUMENTS[0] else None
        return self._forward(adapter, token, step_mask, position[:, None], cache)

    def _forward(
        self, adapter: str | None, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Any
    ) -> tuple[Tensor, Tensor, Any]:
        """The logits and hidden states at the last position of each row, and the cache."""
        more = {"position_ids": position_ids} if self._takes_position_ids else {}
        out, hidden = self._run(
            adapter,
            slice(-1, None),
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{self._cache_argument: cache},
            **more,
        )
        return out.logits[:, -1], hidden[:, -1], getattr(out, self._cache_argument)

    def _run(self, adapter: str | None, positions: Tensor | slice, **inputs: Any) -> tuple[Any, Tensor]:
        """Runs the model, its output head at some positions alone; returns its output and the head's input."""
        seen: list[Tensor] = []

        def choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            seen.append(gather_positions(args[0], positions))
            return (seen[-1], *args[1:])

        model = self.adapters.model
        keep_evaluating(model)
        hook = model.get_output_embeddings().register_forward_pre_hook(choose)
        using = partial(self.adapters.using, adapter)
        try:
            with using(), checkpointed_layers(model, using):
                out = model(return_dict=True, **inputs)
        finally:
            hook.remove()
        if len(seen) != 1:
            raise ValueError(f"the model {self.adapters.name!r} ran its output head {len(seen)} times, not once")
        return out, seen[0]

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
        step: reads one more token: takes token [B, 1], mask, position and cache, which is extended in place; returns
            logits, hidden state and cache.
        newest_logits: [B, V] the logits at the newest token.
        attention_mask: [B, S] over the cached positions.
        position: [B] the position id of the newest token.
        cache: keys and values of the S cached positions, or another state of the model.
        restarts: whether single rows can start anew: a model that is not told positions counts the cache's columns.
    """

    step: Callable[[Tensor, Tensor, Tensor, Any], tuple[Tensor, Tensor, Any]]
    newest_logits: Float[Tensor, "B V"]
    attention_mask: Int[Tensor, "B S"]
    position: Int[Tensor, " B"]
    cache: Any
    restarts: bool = True

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token."""
        return self.newest_logits

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        self.attention_mask = nn.functional.pad(self.attention_mask, (0, 1), value=1)
        self.position = self.position + 1
        found = self.step(token[:, None], self.attention_mask, self.position, self.cache)
        self.newest_logits, self.hidden, self.cache = found

    def _rewind_ended(self, running: Tensor) -> None:
        self.position = self.position * running

    def _select(self, rows: Tensor) -> "CachedDecoding | None":
        if not can_select_rows(self.cache):
            return None
        parts = (self.newest_logits[rows], self.attention_mask[rows], self.position[rows])
        return CachedDecoding(self.hidden[rows], self.step, *parts, select_rows(self.cache, rows), self.restarts)

    @property
    def _replaceable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.restarts and can_replace_rows(self.cache)

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


@dataclass
class RecomputedDecoding(Decoding):
    """Decoding without a cache: every step reads the whole texts again.

    Attributes:
        read: one pass: takes left-aligned texts and positions [B, 1]; returns logits and hidden states.
        newest_logits: [B, V] the logits at the newest token.
        ids: [B, S] the texts so far, left-aligned.
        length: [B] their lengths.
    """

    read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    newest_logits: Float[Tensor, "B V"]
    ids: Int[Tensor, "B S"]
    length: Int[Tensor, " B"]

    @classmethod
    @torch.no_grad()
    def of(
        cls, read: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ids: Tensor, length: Tensor
    ) -> "RecomputedDecoding":
        """Reads left-aligned texts."""
        logits, hidden = read(ids, length[:, None] - 1)
        return cls(hidden[:, 0], read, logits[:, 0], ids, length)

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token."""
        return self.newest_logits

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        width = int(self.length.max()) + 1  # waits for the device, which is little beside a pass over whole texts
        ids = nn.functional.pad(self.ids, (0, max(0, width - self.ids.shape[1])))[:, :width]
        self.ids = ids.scatter(1, self.length[:, None], token[:, None])
        self.length = self.length + 1
        logits, hidden = self.read(self.ids, self.length[:, None] - 1)
        self.newest_logits, self.hidden = logits[:, 0], hidden[:, 0]

    def _rewind_ended(self, running: Tensor) -> None:
        self.length = self.length * running

    def _select(self, rows: Tensor) -> "RecomputedDecoding":
        parts = (self.newest_logits[rows], self.ids[rows], self.length[rows])
        return RecomputedDecoding(self.hidden[rows], self.read, *parts)

    def _replace_rows(self, rows: Tensor, fresh: Decoding, max_length: int | None) -> None:
        assert isinstance(fresh, RecomputedDecoding)
        width = max(self.ids.shape[1], fresh.ids.shape[1])
        own, new = (nn.functional.pad(x.ids, (0, width - x.ids.shape[1])) for x in (self, fresh))
        self.ids = own.index_copy(0, rows, new)
        for name in ("newest_logits", "hidden", "length"):
            setattr(self, name, getattr(self, name).index_copy(0, rows, getattr(fresh, name)))
