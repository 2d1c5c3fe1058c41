"""The forward pass of the GPT-2 and Llama families as functions over fused weights: faster than the model's own.

What a language model spends its time on, without the layers around it: projections that read the same input are one
matrix, LoRA is added inside the projection (or merged into a copy of the weights, for decoding), rotary positions are
one complex product, and texts stand at the left, so that a token's column is its position and a causal pass needs no
mask. `Trunk.unsupported_reason` says which models it supports; others go through transformers. A test compares
the two.
"""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from lmgym.fused.kernels import Gate, RMSNorm, Rotate, call, gated_in_eager, gelu_of_few, rotated_in_eager, take
from lmgym.fused.kv_cache import Cache
from lmgym.fused.onednn import PackedLinear, can_pack, pack_linear
from lmgym.fused.weights import (
    GATED,
    Block,
    Layer,
    Projection,
    blocks_of,
    body_of,
    joined,
    linears_of,
    modules_of,
    norm_weights,
    state_of,
    weights_of,
    width_of,
)


class Trunk:
    """Everything of a transformers model below its head, as functions.

    Args:
        model: a transformers model that `unsupported_reason` accepts; its weights are read anew when they change.
    """

    def __init__(self, model: Any):
        self.body = body_of(model)
        config = model.config
        self.gated = config.model_type in GATED
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.eps: float = config.rms_norm_eps if self.gated else config.layer_norm_epsilon
        self._kept: dict[tuple[str | None, bool], tuple[list[Any], list[Layer]]] = {}
        self._turns = torch.empty(0, self.head // 2, dtype=torch.complex64)
        self._compiled: Callable[..., Tensor] | None = None
        self._outgrown: list[Tensor] = []  # a captured step goes on reading the table that it was captured with

    @staticmethod
    def unsupported_reason(model: Any) -> str | None:
        """Why this model cannot be stood for, or None."""
        config = model.config
        family = config.model_type
        if family not in (*GATED, "gpt2"):
            return f"{family} is not of the GPT-2 or Llama families"
        if family == "gpt2":
            plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
            if not plain or config.add_cross_attention or config.reorder_and_upcast_attn:
                return "its attention is scaled or wired in an unusual way"
            return None if config.activation_function == "gelu_new" else "its activation is not gelu_new"
        windows = "sliding_attention" in (getattr(config, "layer_types", None) or ())
        if windows or (family == "mistral" and config.sliding_window is not None):
            return "its attention has a sliding window"
        if config.rope_parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
            return f"its rotary positions are of the type {config.rope_parameters['rope_type']!r}"
        return None if config.hidden_act == "silu" else f"its activation is {config.hidden_act}"

    # Weights -------------------------------------------------------------------------------------------------------

    def layers(self, adapter: str | None = None, decode: bool = False) -> list[Layer]:
        """The weights of every layer with one adapter on, or with none.

        Args:
            adapter: a LoRA adapter.
            decode: whether they are for decoding, which keeps no gradients: the adapter is added into a copy of the
                weights instead of being kept apart, and on a CPU the copy is packed where that pays.

        Frozen weights are fused once, and again when torch counts a change in them; those that are trained, each time.
        """
        decode = decode and (adapter is not None or can_pack(self.body.device, self.body.dtype))
        if adapter is not None and not decode:
            return [
                self._with_adapter(*pair, adapter) for pair in zip(self.layers(), blocks_of(self.body), strict=True)
            ]
        tensors = [t for block in blocks_of(self.body) for m in modules_of(block) for t in weights_of(m, adapter)]
        trained = any(t.requires_grad for t in tensors)
        state = [state_of(t) for t in tensors]
        kept = self._kept.get((adapter, decode))
        if kept is not None and kept[0] == state and not trained:
            return kept[1]
        # A rollout runs in inference mode, and what it leaves behind must be of use to training.
        differentiable = trained and not decode and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            layers = [self._fused(block, adapter, decode) for block in blocks_of(self.body)]
        # What is trained is not kept: it would only be memory held for the next rollout's copy.
        if not trained:
            self._kept[adapter, decode] = (state, layers)
        elif adapter is None:  # all that was made of the base is old, though torch may not have counted the change
            self._kept.clear()
        else:
            self._kept.pop((adapter, decode), None)
        return layers

    def lowest(self, adapter: str | None) -> int:
        """The first layer that an adapter changes; the number of layers without one."""
        blocks = list(blocks_of(self.body))
        changed = (i for i, b in enumerate(blocks) if any(adapter in getattr(m, "lora_A", ()) for m in linears_of(b)))
        return next(changed, len(blocks))

    @staticmethod
    def unsupported_adapter_reason(model: Any, adapter: str) -> str | None:
        """Why an adapter of a model that `unsupported_reason` accepts cannot be stood for, or None."""
        body = body_of(model)
        ours = {id(m) for block in blocks_of(body) for m in linears_of(block)}
        for module in model.modules():
            if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ()):
                if id(module) not in ours:
                    return f"the adapter {adapter!r} changes more than the layers' projections"
                if adapter in module.lora_variant or module.lora_bias.get(adapter) or module.merged:
                    return f"the adapter {adapter!r} is no plain LoRA"
        return None

    def _fused(self, block: Block, adapter: str | None, decode: bool) -> Layer:
        norms = None
        if block.head_norms is not None:
            norms = (self._pairs(block.head_norms[0].weight), self._pairs(block.head_norms[1].weight))
        return Layer(
            norm_weights(block.first_norm),
            self._project(block.qkv, adapter, decode, rotary=True),
            self._project((block.out,), adapter, decode),
            norm_weights(block.second_norm),
            self._project(block.up, adapter, decode),
            self._project((block.down,), adapter, decode),
            norms,
        )

    def _project(
        self, modules: Sequence[Any], adapter: str | None, decode: bool, rotary: bool = False
    ) -> Projection | PackedLinear:
        weights, biases = [], []
        for i, module in enumerate(modules):
            base = getattr(module, "base_layer", module)
            weight = base.weight if isinstance(base, nn.Linear) else base.weight.T  # GPT-2's Conv1D is [in, out]
            if adapter in getattr(module, "lora_A", ()):
                delta = module.lora_B[adapter].weight.float() @ module.lora_A[adapter].weight.float()
                weight = (weight.float() + module.scaling[adapter] * delta).to(weight.dtype)
            turned = rotary and self.gated and i < 2
            weights.append(self._pairs(weight) if turned else weight)
            if base.bias is not None:
                biases.append(self._pairs(base.bias) if turned else base.bias)
        weight, bias = joined(weights), joined(biases) if biases else None
        return (pack_linear(weight, bias) if decode else None) or Projection(weight, bias)

    def _with_adapter(self, layer: Layer, block: Block, adapter: str) -> Layer:
        def add(projection: Projection | PackedLinear, modules: Sequence[Any], rotary: bool = False) -> Projection:
            assert isinstance(projection, Projection)
            parts = [(i, m) for i, m in enumerate(modules) if adapter in getattr(m, "lora_A", ())]
            if not parts:
                return projection
            ups, columns = [], 0
            downs = [module.lora_A[adapter].weight for _, module in parts]
            rank = sum(len(down) for down in downs)
            for i, module in enumerate(modules):
                if adapter not in getattr(module, "lora_A", ()):
                    ups.append(projection.weight.new_zeros(width_of(module), rank))
                    continue
                up = module.lora_B[adapter].weight * module.scaling[adapter]
                up = self._pairs(up) if rotary and self.gated and i < 2 else up
                ups.append(nnf.pad(up, (columns, rank - columns - up.shape[1])))
                columns += up.shape[1]
            down, up = (x[0] if len(x) == 1 else torch.cat(x) for x in (downs, ups))
            return projection._replace(down=down, up=up)

        return layer._replace(
            qkv=add(layer.qkv, block.qkv, rotary=True),
            out=add(layer.out, (block.out,)),
            up=add(layer.up, block.up),
            down=add(layer.down, (block.down,)),
        )

    def _pairs(self, rows: Tensor) -> Tensor:
        """Puts the two halves of each head's rows side by side, so that a rotation is a product of complex numbers.

        Queries and keys are permuted alike, which leaves their dot products as they were.
        """
        halves = rows.unflatten(0, (-1, 2, self.head // 2))
        return halves.transpose(1, 2).flatten(0, 2)

    # Passes --------------------------------------------------------------------------------------------------------

    def embed(self, ids: Int[Tensor, "*rows"], position: Int[Tensor, "*columns"]) -> Float[Tensor, "*rows D"]:
        """What goes into the first layer."""
        if self.gated:
            return nnf.embedding(ids, self.body.embed_tokens.weight)
        return nnf.embedding(ids, self.body.wte.weight) + nnf.embedding(position, self.body.wpe.weight)

    def read(
        self,
        layers: list[Layer],
        ids: Int[Tensor, "B L"],
        at: Int[Tensor, "B T"] | slice | None = None,
        frozen_prefix: Float[Tensor, "B L D"] | None = None,
        first: int = 0,
        cache: Cache | None = None,
        keep: int = 0,
    ) -> Float[Tensor, "B T D"]:
        """One causal pass over texts that stand at the left; what stands behind a text does not matter to it.

        Args:
            layers: the weights.
            ids: the texts.
            at: the positions to give, for each row or for all alike; None gives all. Only these go through the last
                layer's second half.
            frozen_prefix: what goes into layer `first`, instead of starting from the ids.
            first: the first layer to run.
            cache: takes the keys and values of all positions.
            keep: the layer whose input the cache keeps as its `frozen_prefix`, where it has one.

        Returns:
            The final hidden states, after the last norm.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids, position) if frozen_prefix is None else frozen_prefix
        turns = self._turn(ids.shape[1], ids.device)[:, None] if self.gated else None
        last = norm_weights(self.body.norm if self.gated else self.body.ln_f)
        if self._compiled is None or not torch.is_grad_enabled():
            return self._run(layers, last, x, turns, at, first, cache, keep)
        if isinstance(at, slice):
            at = torch.arange(at.start, at.stop, device=x.device).expand(len(x), -1)
        turns = None if turns is None else torch.view_as_real(turns)
        for part, dims in ((x, (0, 1)), (at, (0, 1)), (turns, (0,))):
            if part is not None:
                torch._dynamo.maybe_mark_dynamic(part, dims)
        return self._compiled(layers, last, x, turns, at, first, cache, keep)

    def compile(self) -> None:
        """Lets torch compile the passes that are differentiated: once, for texts of any number and length.

        Raises:
            ValueError: there is no C++ compiler, without which torch compiles nothing.
        """
        if self._compiled is not None:
            return
        wanted = os.environ.get("CXX") or {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        if shutil.which(wanted) is None:
            raise ValueError(
                f"torch.compile needs a C++ compiler, and there is no {wanted!r} on the PATH: install one, name "
                "another in the environment variable CXX, or leave compile off"
            )
        self._compiled = torch.compile(self._run, options={"emulate_precision_casts": True})

    def _run(
        self,
        layers: list[Layer],
        last: tuple[Tensor, ...],
        x: Tensor,
        turns: Tensor | None,
        at: Tensor | slice | None,
        first: int,
        cache: Cache | None,
        keep: int,
    ) -> Tensor:
        for i in range(first, len(layers)):
            layer = layers[i]
            if cache is not None and cache.frozen_prefix is not None and i == keep:
                cache.frozen_prefix[:, : x.shape[1]] = x
            q, k, v = self._qkv(layer, x, turns, exact=cache is None)
            if cache is not None:
                cache.layers[i][0, :, :, : x.shape[1]] = k.transpose(1, 2)
                cache.layers[i][1, :, :, : x.shape[1]] = v.transpose(1, 2)
            mixed = self._attend(q, k, v).to(x.dtype)
            if at is not None and i == len(layers) - 1:
                x, mixed = take(x, at), take(mixed, at)
            x = layer.out(mixed, residual=x)
            x = layer.down(self._activated(layer, x), residual=x)
        return self._norm(x, last)

    def step(self, layers: list[Layer], token: Int[Tensor, " B"], cache: Cache, keep: int = 0) -> Float[Tensor, "B D"]:
        """Reads one more token in every row, and writes its keys and values behind the row's others.

        The cache must have room for one more column. Its `length`, `longest` are moved on.
        """
        x = self.embed(token, cache.length)
        columns = cache.capacity if cache.fixed else cache.longest + 1
        turns = self._turn(columns, token.device)[cache.length][:, None] if self.gated else None
        mask, rows = None, torch.arange(0 if cache.equal else len(token), device=token.device)
        if not cache.equal:
            beyond = torch.arange(columns, device=token.device) > cache.length[:, None]
            mask = cache.layers[0].new_zeros(beyond.shape).masked_fill_(beyond, -torch.inf)
            mask = mask[:, None, None]
        for i, layer in enumerate(layers):
            store = cache.layers[i]
            if cache.frozen_prefix is not None and i == keep:
                if cache.equal:
                    cache.frozen_prefix[:, cache.longest] = x
                else:
                    cache.frozen_prefix[rows, cache.length] = x
            h = self._norm(x, layer.first_norm)
            qkv = layer.qkv(h).view(len(token), -1, self.head)
            if turns is not None:
                qkv = self._positioned(qkv, turns, layer.head_norms)
            kv = qkv[:, self.heads :].unflatten(1, (2, self.kv_heads)).transpose(0, 1)
            if cache.equal:
                store[:, :, :, cache.longest] = kv
            else:
                store[:, rows, :, cache.length] = kv.transpose(0, 1).to(store.dtype)
            mixed = self._attend_one(qkv[:, : self.heads], store[:, :, :, :columns], mask)
            x = layer.out.add_to(x, mixed)
            x = layer.down.add_to(x, self._activated(layer, x, gelu_of_few))
        if cache.fixed:
            cache.length.add_(1)
        else:
            cache.length, cache.longest = cache.length + 1, columns
        return self._norm(x, norm_weights(self.body.norm if self.gated else self.body.ln_f))

    def _attend_one(self, q: Tensor, keys_and_values: Tensor, mask: Tensor | None) -> Tensor:
        """[B, heads · head] attention of one token a row; queries that share a key head go together."""
        q = q.unflatten(1, (self.kv_heads, -1))
        keys, values = keys_and_values.unbind(0)
        if q.device.type != "cpu":
            return nnf.scaled_dot_product_attention(q, keys, values, attn_mask=mask).flatten(1)
        # Two batched products are a quarter faster here than the attention kernel, which is made for many queries.
        few, keys, values = (x.flatten(0, 1) for x in (q.to(keys.dtype), keys, values))
        scale, shape = self.head**-0.5, (*few.shape[:2], keys.shape[1])
        if mask is None:
            weights = torch.baddbmm(few.new_empty(shape), few, keys.transpose(1, 2), beta=0, alpha=scale)
        else:
            masked = mask.expand(-1, self.kv_heads, few.shape[1], -1).reshape(shape)
            weights = torch.baddbmm(masked, few, keys.transpose(1, 2), alpha=scale)
        return torch.bmm(weights.softmax(-1), values).view(len(q), -1).to(q.dtype)

    def cache(
        self, rows: int, columns: int, like: Tensor, length: Tensor, equal: bool, frozen_prefix: bool = False
    ) -> Cache:
        """An empty cache."""
        width = self.body.config.hidden_size
        # float32 on a CPU, whose attention kernel takes three times as long in bfloat16.
        dtype = torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype
        layers = [like.new_empty(2, 0, self.kv_heads, 0, self.head, dtype=dtype) for _ in blocks_of(self.body)]
        nothing = Cache(layers, length[:0], 0, equal, like.new_empty(0, 0, width) if frozen_prefix else None)
        return nothing.like(rows, columns, length)

    def _qkv(self, layer: Layer, x: Tensor, turns: Tensor | None, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[B, L, heads, head] each, with positions; `exact` gives float32 where that is what training takes."""
        qkv = layer.qkv(self._norm(x, layer.first_norm)).unflatten(-1, (-1, self.head))
        if exact and qkv.device.type == "cpu":
            # The backward pass of attention in bfloat16 takes eight times as long as that in float32 on a CPU. Passes
            # without one do the same, so that what is compared with training was computed as in training.
            qkv = qkv.float()
        if turns is not None:
            qkv = self._positioned(qkv, turns, layer.head_norms)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], -2)
        return q, k, v

    def _positioned(self, qkv: Tensor, turns: Tensor, norms: tuple[Tensor, Tensor] | None) -> Tensor:
        count = self.heads + self.kv_heads
        if norms is not None:
            q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], -2)
            q, k = (nnf.rms_norm(x, (self.head,), w.to(x.dtype), self.eps) for x, w in zip((q, k), norms, strict=True))
            qkv = torch.cat([q, k, v], -2)
        return call(Rotate, qkv, turns, count) if turns.is_complex() else rotated_in_eager(qkv, turns, count)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, L, heads · head] causal attention."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = self.kv_heads != self.heads
        mixed = nnf.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return mixed.transpose(1, 2).flatten(2)

    def _activated(self, layer: Layer, x: Tensor, gelu: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """What the MLP's second projection reads."""
        h = layer.up(self._norm(x, layer.second_norm))
        if self.gated:
            return gated_in_eager(h) if torch.compiler.is_compiling() else call(Gate, h)
        return gelu(h) if gelu else nnf.gelu(h, approximate="tanh")

    def _norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if not self.gated:
            return torch.layer_norm(x, (x.shape[-1],), weights[0], weights[1], self.eps)
        return call(RMSNorm, x, weights[0], self.eps)

    def _turn(self, columns: int, device: torch.device) -> Complex[Tensor, "L half"]:
        """exp(i · angle) of each position and pair, from the model's own table."""
        if len(self._turns) < columns or self._turns.device != device:
            with torch.inference_mode(False), torch.no_grad():
                position = torch.arange(max(columns, 2 * len(self._turns)), device=device)[None]
                cos, sin = self.body.rotary_emb(torch.zeros((), device=device), position)
                half = self.head // 2
                self._outgrown.append(self._turns)
                self._turns = torch.complex(cos[0, :, :half], sin[0, :, :half])
        return self._turns[:columns]
