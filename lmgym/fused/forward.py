"""The forward pass of the GPT-2 and Llama families as functions over fused weights: faster than the model's own.

It runs the large operations of a language model without the modules around them. Projections with the same input are
one matrix product. LoRA is computed inside the projection, or merged into a copy of the weights for decoding. Rotary
positions are one complex product. Texts are left-aligned, so that a token's column is its position and a causal pass
needs no mask. `unsupported_reason` says which models are supported; the others go through transformers. A test compares
the two.
"""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.nn import functional as nnf

from lmgym.fused.architectures import GATED, blocks_of, body_of, norm_weights
from lmgym.fused.kernels import (
    Gate,
    RMSNorm,
    Rotate,
    call,
    fast_gelu,
    gate_decomposed,
    gather_positions,
    rotate_real,
)
from lmgym.fused.kv_cache import KVCache
from lmgym.fused.recompute import recomputed
from lmgym.fused.weights import FusedWeights, Layer


class FusedModel:
    """All of a transformers model below its head, as a faster forward pass.

    Args:
        model: a transformers model that `unsupported_reason` accepts.

    Attributes:
        weights: its fused weights; they follow changes of the model's own.
    """

    def __init__(self, model: Any):
        config = model.config
        self.body = body_of(model)
        self.gated = config.model_type in GATED
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_size: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps if self.gated else config.layer_norm_epsilon
        self.weights = FusedWeights(model, self.head_size)
        self._rotation_table = torch.empty(0, self.head_size // 2, dtype=torch.complex64)
        self._old_tables: list[Tensor] = []  # a captured step still reads the table that it was captured with
        self._compiled: Callable[..., Tensor] | None = None

    def embed(self, ids: Int[Tensor, "*rows"], position: Int[Tensor, "*columns"]) -> Float[Tensor, "*rows D"]:
        """The input of the first layer."""
        if self.gated:
            return nnf.embedding(ids, self.body.embed_tokens.weight)
        return nnf.embedding(ids, self.body.wte.weight) + nnf.embedding(position, self.body.wpe.weight)

    def forward(
        self,
        layers: list[Layer],
        ids: Int[Tensor, "B L"],
        positions: Int[Tensor, "B T"] | slice | None = None,
        frozen_prefix: Float[Tensor, "B L D"] | None = None,
        first_layer: int = 0,
        cache: KVCache | None = None,
        frozen_layers: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """One causal pass over left-aligned texts; whatever follows a text does not affect it.

        Args:
            layers: the weights, from `weights.layers`.
            ids: the texts.
            positions: the positions to return: one index per row and step, or a slice for all rows; None returns all.
                The last layer's MLP runs on these alone.
            frozen_prefix: the input of layer `first_layer`, as an earlier pass computed it; None starts from the ids.
            first_layer: the first layer to run.
            cache: the keys and values of all positions are written into it.
            frozen_layers: if the cache has a `frozen_prefix`, the output of this many layers is written into it.

        Returns:
            The last hidden states, after the final norm.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids, position) if frozen_prefix is None else frozen_prefix
        rotations = self._rotations(ids.shape[1], ids.device)[:, None] if self.gated else None
        last = norm_weights(self.body.norm if self.gated else self.body.ln_f)
        if self._compiled is None or not torch.is_grad_enabled():
            return self._run_layers(layers, last, x, rotations, positions, first_layer, cache, frozen_layers)
        if isinstance(positions, slice):
            positions = torch.arange(positions.start, positions.stop, device=x.device).expand(len(x), -1)
        rotations = None if rotations is None else torch.view_as_real(rotations)
        for part, dims in ((x, (0, 1)), (positions, (0, 1)), (rotations, (0,))):
            if part is not None:
                torch._dynamo.maybe_mark_dynamic(part, dims)
        return self._compiled(layers, last, x, rotations, positions, first_layer, cache, frozen_layers)

    def compile(self) -> None:
        """Compiles the passes that are differentiated: once, for any number and length of texts.

        Raises:
            ValueError: there is no C++ compiler; torch.compile needs one.
        """
        if self._compiled is not None:
            return
        wanted = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(wanted) is None:
            raise ValueError(
                f"torch.compile needs a C++ compiler, and there is no {wanted!r} on the PATH: install one, name "
                "another in the environment variable CXX, or leave compile off"
            )
        self._compiled = torch.compile(self._run_layers, options={"emulate_precision_casts": True})

    def _run_layers(
        self,
        layers: list[Layer],
        last: tuple[Tensor, ...],
        x: Tensor,
        rotations: Tensor | None,
        positions: Tensor | slice | None,
        first_layer: int,
        cache: KVCache | None,
        frozen_layers: int,
    ) -> Tensor:
        for i in range(first_layer, len(layers)):
            layer = layers[i]
            if cache is not None and cache.frozen_prefix is not None and i == frozen_layers:
                cache.frozen_prefix[:, : x.shape[1]] = x
            taken = positions if i == len(layers) - 1 else None
            x = recomputed(self._run_layer, i, layer, x, rotations, taken, cache)
        return self._norm(x, last)

    def _run_layer(
        self,
        number: int,
        layer: Layer,
        x: Tensor,
        rotations: Tensor | None,
        positions: Tensor | slice | None,
        cache: KVCache | None,
    ) -> Tensor:
        """One layer; with `positions`, its MLP and the result are those of these positions alone."""
        q, k, v = self._qkv(layer, x, rotations, exact=cache is None)
        if cache is not None:
            cache.layers[number][0, :, :, : x.shape[1]] = k.transpose(1, 2)
            cache.layers[number][1, :, :, : x.shape[1]] = v.transpose(1, 2)
        mixed = self._attend(q, k, v).to(x.dtype)
        if positions is not None:
            x, mixed = gather_positions(x, positions), gather_positions(mixed, positions)
        x = layer.out(mixed, residual=x)
        return layer.down(self._mlp_hidden(layer, x), residual=x)

    def step(
        self, layers: list[Layer], token: Int[Tensor, " B"], cache: KVCache, frozen_layers: int = 0
    ) -> Float[Tensor, "B D"]:
        """Reads one more token in every row and appends its keys and values to the cache.

        The cache must have a free column. Its `length` and `longest` are increased by one.
        """
        x = self.embed(token, cache.length)
        columns = cache.capacity if cache.static else cache.longest + 1
        rotations = self._rotations(columns, token.device)[cache.length][:, None] if self.gated else None
        mask, rows = None, torch.arange(0 if cache.equal_lengths else len(token), device=token.device)
        if not cache.equal_lengths:
            beyond = torch.arange(columns, device=token.device) > cache.length[:, None]
            mask = cache.layers[0].new_zeros(beyond.shape).masked_fill_(beyond, -torch.inf)
            mask = mask[:, None, None]
        for i, layer in enumerate(layers):
            store = cache.layers[i]
            if cache.frozen_prefix is not None and i == frozen_layers:
                if cache.equal_lengths:
                    cache.frozen_prefix[:, cache.longest] = x
                else:
                    cache.frozen_prefix[rows, cache.length] = x
            h = self._norm(x, layer.first_norm)
            qkv = layer.qkv(h).view(len(token), -1, self.head_size)
            if rotations is not None:
                qkv = self._rotate(qkv, rotations, layer.head_norms)
            kv = qkv[:, self.heads :].unflatten(1, (2, self.kv_heads)).transpose(0, 1)
            if cache.equal_lengths:
                store[:, :, :, cache.longest] = kv
            else:
                store[:, rows, :, cache.length] = kv.transpose(0, 1).to(store.dtype)
            mixed = self._attend_step(qkv[:, : self.heads], store[:, :, :, :columns], mask)
            x = layer.out.add_to(x, mixed)
            x = layer.down.add_to(x, self._mlp_hidden(layer, x, fast_gelu))
        if cache.static:
            cache.length.add_(1)
        else:
            cache.length, cache.longest = cache.length + 1, columns
        return self._norm(x, norm_weights(self.body.norm if self.gated else self.body.ln_f))

    def _attend_step(self, q: Tensor, keys_and_values: Tensor, mask: Tensor | None) -> Tensor:
        """[B, heads · head_size] attention of one token per row; the queries of a key head are processed together."""
        q = q.unflatten(1, (self.kv_heads, -1))
        keys, values = keys_and_values.unbind(0)
        if q.device.type != "cpu":
            return nnf.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1)
        # For one query, two batched products are a quarter faster than the attention kernel.
        few, keys, values = (x.flatten(0, 1) for x in (q.to(keys.dtype), keys, values))
        scale, shape = self.head_size**-0.5, (*few.shape[:2], keys.shape[1])
        if mask is None:
            weights = torch.baddbmm(few.new_empty(shape), few, keys.transpose(1, 2), beta=0, alpha=scale)
        else:
            masked = mask.expand(-1, self.kv_heads, few.shape[1], -1).reshape(shape)
            weights = torch.baddbmm(masked, few, keys.transpose(1, 2), alpha=scale)
        return torch.bmm(weights.softmax(-1), values).view(len(q), -1).to(q.dtype)

    def empty_cache(
        self, rows: int, columns: int, like: Tensor, length: Tensor, equal_lengths: bool, frozen_prefix: bool = False
    ) -> KVCache:
        """An empty cache.

        Args:
            rows: B.
            columns: S, the positions that it can hold.
            like: a weight of the model; gives device and dtype.
            length: [B] the length of each row.
            equal_lengths: whether all lengths are known to be equal.
            frozen_prefix: whether it stores the output of the frozen layers too.
        """
        width = self.body.config.hidden_size
        # On a CPU float32: its attention kernel takes three times as long in bfloat16.
        dtype = torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype
        layers = [like.new_empty(2, 0, self.kv_heads, 0, self.head_size, dtype=dtype) for _ in blocks_of(self.body)]
        prefix = like.new_empty(0, 0, width) if frozen_prefix else None
        return KVCache(layers, length[:0], 0, equal_lengths, prefix).empty_like(rows, columns, length)

    def _qkv(self, layer: Layer, x: Tensor, rotations: Tensor | None, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, heads, head_size] each, with positions applied; `exact` computes attention in float32 on a CPU."""
        qkv = layer.qkv(self._norm(x, layer.first_norm)).unflatten(-1, (-1, self.head_size))
        if exact and qkv.device.type == "cpu":
            # On a CPU the backward pass of attention takes eight times as long in bfloat16 as in float32. Passes
            # without a backward pass use float32 too, so that their results agree with those of training.
            qkv = qkv.float()
        if rotations is not None:
            qkv = self._rotate(qkv, rotations, layer.head_norms)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], -2)
        return q, k, v

    def _rotate(self, qkv: Tensor, rotations: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
        count = self.heads + self.kv_heads
        if norms is not None:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], -2)
            q, k = (
                nnf.rms_norm(x, (self.head_size,), w.to(x.dtype), self.eps) for x, w in zip((q, k), norms, strict=True)
            )
            qkv = torch.cat([q, k, v], -2)
        return call(Rotate, qkv, rotations, count) if rotations.is_complex() else rotate_real(qkv, rotations, count)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, heads · head_size] causal attention."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = self.kv_heads != self.heads
        mixed = nnf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return mixed.transpose(1, 2).flatten(2)

    def _mlp_hidden(self, layer: Layer, x: Tensor, gelu: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The input of the MLP's output projection."""
        h = layer.up(self._norm(x, layer.second_norm))
        if self.gated:
            return gate_decomposed(h) if torch.compiler.is_compiling() else call(Gate, h)
        return gelu(h) if gelu else nnf.gelu(h, approximate="tanh")

    def _norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if not self.gated:
            return torch.layer_norm(x, (x.shape[-1],), weights[0], weights[1], self.eps)
        return call(RMSNorm, x, weights[0], self.eps)

    def _rotations(self, columns: int, device: torch.device) -> Complex[Tensor, "L half"]:
        """exp(i · angle) of each position and pair, from the model's own table."""
        if len(self._rotation_table) < columns or self._rotation_table.device != device:
            with torch.inference_mode(False), torch.no_grad():
                position = torch.arange(max(columns, 2 * len(self._rotation_table)), device=device)[None]
                cos, sin = self.body.rotary_emb(torch.zeros((), device=device), position)
                half = self.head_size // 2
                self._old_tables.append(self._rotation_table)
                self._rotation_table = torch.complex(cos[0, :, :half], sin[0, :, :half])
        return self._rotation_table[:columns]
