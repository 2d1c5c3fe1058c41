"""The forward pass of the GPT-2 and Llama families as functions over fused weights: faster than the model's own.

What a language model spends its time on, without the layers around it: projections that read the same input are one
matrix, LoRA is added inside the projection (or merged into a copy of the weights, for decoding), rotary positions are
one complex product, and texts stand at the left, so that a token's column is its position and a causal pass needs no
mask. `Trunk.refusal` says which models it can stand for; others go through transformers, and a test holds the two
against each other.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn
from torch.nn import functional as nnf

from lmgym.devices import free_to_look
from lmgym.packed import Packed, pack, packs

GATED = ("llama", "mistral", "qwen2", "qwen3")
"""Families with rotary positions, RMSNorm and a gated MLP; SmolLM and SmolLM2 are Llamas."""


class Projection(NamedTuple):
    """`x Wᵀ + b`, and `(x downᵀ) upᵀ` of a LoRA adapter that is not merged.

    Attributes:
        weight: [out, in].
        bias: [out] or None.
        down: [R, in] the A matrices of all fused parts, one above the other; None without an adapter.
        up: [out, R] the B matrices with their scale, block-diagonal.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None
    down: Float[Tensor, "R in"] | None = None
    up: Float[Tensor, "out R"] | None = None

    def __call__(self, x: Float[Tensor, "*rows in"], residual: Tensor | None = None) -> Float[Tensor, "*rows out"]:
        flat = x if x.ndim == 2 else x.flatten(0, -2)
        if self.down is None:
            y = nnf.linear(flat, self.weight, self.bias)
        else:
            down, up = (part.to(x.dtype) for part in (self.down, self.up) if part is not None)
            y = _LoRA.apply(flat, self.weight, self.bias, down, up)
        y = y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])
        return y if residual is None else y.add_(residual)

    def add_to(self, x: Float[Tensor, "N out"], inner: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        """`x + inner Wᵀ + b` in place, of merged weights and without a gradient: the product itself does the adding."""
        x.addmm_(inner, self.weight.T)
        return x if self.bias is None else x.add_(self.bias)


class Layer(NamedTuple):
    """One block of the model.

    Attributes:
        first_norm: weight, and bias where it is a LayerNorm, before attention.
        qkv: queries, keys and values in one.
        out: what attention writes.
        second_norm: before the MLP.
        up: the MLP's first projection; gate and up in one where it is gated.
        down: the MLP's second.
        head_norms: weights of the RMSNorms of each query and key head (Qwen3), or None.
    """

    first_norm: tuple[Tensor, ...]
    qkv: Projection | Packed
    out: Projection | Packed
    second_norm: tuple[Tensor, ...]
    up: Projection | Packed
    down: Projection | Packed
    head_norms: tuple[Tensor, Tensor] | None


@dataclass
class Cache:
    """Keys and values of texts that stand at the left: column c holds position c.

    Attributes:
        layers: for each layer [2, B, H_kv, S, head], keys and values.
        length: [B] how many columns of each row are filled.
        longest: at least the largest length, known without asking the device.
        equal: whether all lengths are known to be equal, so that no mask is needed.
        bottom: [B, S, D] what goes into the lowest layer with an adapter, where it is to be kept.
        fixed: whether nothing in it ever moves: a step then is the same operations each time, over all S columns, and
            `longest` is moved on by the caller.
    """

    layers: list[Float[Tensor, "2 B K S H"]]
    length: Int[Tensor, " B"]
    longest: int
    equal: bool
    bottom: Float[Tensor, "B S D"] | None = None
    fixed: bool = False

    @property
    def capacity(self) -> int:
        """S, the columns that there is room for."""
        return self.layers[0].shape[3]

    def parts(self) -> Iterator[tuple[Tensor, int]]:
        """[B, …] all that is kept for each position, and the dimension along which positions lie."""
        for layer in self.layers:
            yield from ((layer[0], 2), (layer[1], 2))
        if self.bottom is not None:
            yield self.bottom, 1

    def like(self, rows: int, columns: int, length: Tensor) -> "Cache":
        """An empty cache of another size."""

        def empty(x: Tensor, *shape: int) -> Tensor:
            # A masked column must hold numbers: 0 times what memory happened to hold may be none. Without a mask
            # nothing is read before it is written.
            return x.new_empty(shape) if self.equal else x.new_zeros(shape)

        layers = [empty(x, 2, rows, x.shape[2], columns, x.shape[4]) for x in self.layers]
        bottom = None if self.bottom is None else empty(self.bottom, rows, columns, self.bottom.shape[2])
        return Cache(layers, length, self.longest, self.equal, bottom)

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


@dataclass
class _Block:
    """The modules of one layer, as they stand in the model."""

    first_norm: Any
    qkv: Sequence[Any]
    out: Any
    second_norm: Any
    up: Sequence[Any]
    down: Any
    head_norms: tuple[Any, Any] | None = None


class Trunk:
    """Everything of a transformers model below its head, as functions.

    Args:
        model: a transformers model of a family that `refusal` accepts; its weights are read anew when they change.
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
    def refusal(model: Any) -> str | None:
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
        decode = decode and (adapter is not None or packs(self.body.device, self.body.dtype))
        if adapter is not None and not decode:
            return [self._with_adapter(*pair, adapter) for pair in zip(self.layers(), _blocks(self.body), strict=True)]
        tensors = [t for block in _blocks(self.body) for m in _modules(block) for t in _tensors(m, adapter)]
        trained = any(t.requires_grad for t in tensors)
        state = [state_of(t) for t in tensors]
        kept = self._kept.get((adapter, decode))
        if kept is not None and kept[0] == state and not trained:
            return kept[1]
        # A rollout runs in inference mode, and what it leaves behind must be of use to training.
        differentiable = trained and not decode and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            layers = [self._fused(block, adapter, decode) for block in _blocks(self.body)]
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
        blocks = list(_blocks(self.body))
        changed = (i for i, b in enumerate(blocks) if any(adapter in getattr(m, "lora_A", ()) for m in _linears(b)))
        return next(changed, len(blocks))

    @staticmethod
    def adapter_refusal(model: Any, adapter: str) -> str | None:
        """Why an adapter of a model that `refusal` accepts cannot be stood for, or None."""
        body = body_of(model)
        ours = {id(m) for block in _blocks(body) for m in _linears(block)}
        for module in model.modules():
            if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ()):
                if id(module) not in ours:
                    return f"the adapter {adapter!r} changes more than the layers' projections"
                if adapter in module.lora_variant or module.lora_bias.get(adapter) or module.merged:
                    return f"the adapter {adapter!r} is no plain LoRA"
        return None

    def _fused(self, block: _Block, adapter: str | None, decode: bool) -> Layer:
        norms = None
        if block.head_norms is not None:
            norms = (self._pairs(block.head_norms[0].weight), self._pairs(block.head_norms[1].weight))
        return Layer(
            _norm_weights(block.first_norm),
            self._project(block.qkv, adapter, decode, rotary=True),
            self._project((block.out,), adapter, decode),
            _norm_weights(block.second_norm),
            self._project(block.up, adapter, decode),
            self._project((block.down,), adapter, decode),
            norms,
        )

    def _project(
        self, modules: Sequence[Any], adapter: str | None, decode: bool, rotary: bool = False
    ) -> Projection | Packed:
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
        weight, bias = _joined(weights), _joined(biases) if biases else None
        return (pack(weight, bias) if decode else None) or Projection(weight, bias)

    def _with_adapter(self, layer: Layer, block: _Block, adapter: str) -> Layer:
        def add(projection: Projection | Packed, modules: Sequence[Any], rotary: bool = False) -> Projection:
            assert isinstance(projection, Projection)
            parts = [(i, m) for i, m in enumerate(modules) if adapter in getattr(m, "lora_A", ())]
            if not parts:
                return projection
            ups, columns = [], 0
            downs = [module.lora_A[adapter].weight for _, module in parts]
            rank = sum(len(down) for down in downs)
            for i, module in enumerate(modules):
                if adapter not in getattr(module, "lora_A", ()):
                    ups.append(projection.weight.new_zeros(_width(module), rank))
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
        bottom: Float[Tensor, "B L D"] | None = None,
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
            bottom: what goes into layer `first`, instead of starting from the ids.
            first: the first layer to run.
            cache: takes the keys and values of all positions.
            keep: the layer whose input the cache keeps as its `bottom`, where it has one.

        Returns:
            The final hidden states, after the last norm.
        """
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids, position) if bottom is None else bottom
        turns = self._turn(ids.shape[1], ids.device)[:, None] if self.gated else None
        last = _norm_weights(self.body.norm if self.gated else self.body.ln_f)
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
            if cache is not None and cache.bottom is not None and i == keep:
                cache.bottom[:, : x.shape[1]] = x
            q, k, v = self._qkv(layer, x, turns, exact=cache is None)
            if cache is not None:
                cache.layers[i][0, :, :, : x.shape[1]] = k.transpose(1, 2)
                cache.layers[i][1, :, :, : x.shape[1]] = v.transpose(1, 2)
            mixed = self._attend(q, k, v).to(x.dtype)
            if at is not None and i == len(layers) - 1:
                x, mixed = _take(x, at), _take(mixed, at)
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
            if cache.bottom is not None and i == keep:
                if cache.equal:
                    cache.bottom[:, cache.longest] = x
                else:
                    cache.bottom[rows, cache.length] = x
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
            x = layer.down.add_to(x, self._activated(layer, x, _gelu_of_few))
        if cache.fixed:
            cache.length.add_(1)
        else:
            cache.length, cache.longest = cache.length + 1, columns
        return self._norm(x, _norm_weights(self.body.norm if self.gated else self.body.ln_f))

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

    def cache(self, rows: int, columns: int, like: Tensor, length: Tensor, equal: bool, bottom: bool = False) -> Cache:
        """An empty cache."""
        width = self.body.config.hidden_size
        # float32 on a CPU, whose attention kernel takes three times as long in bfloat16.
        dtype = torch.float32 if like.device.type == "cpu" and like.dtype == torch.bfloat16 else like.dtype
        layers = [like.new_empty(2, 0, self.kv_heads, 0, self.head, dtype=dtype) for _ in _blocks(self.body)]
        nothing = Cache(layers, length[:0], 0, equal, like.new_empty(0, 0, width) if bottom else None)
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
        return _call(_Turn, qkv, turns, count) if turns.is_complex() else _turned_plainly(qkv, turns, count)

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
            return _gated_plainly(h) if torch.compiler.is_compiling() else _call(_Gate, h)
        return gelu(h) if gelu else nnf.gelu(h, approximate="tanh")

    def _norm(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        if not self.gated:
            return torch.layer_norm(x, (x.shape[-1],), weights[0], weights[1], self.eps)
        return _call(_RMSNorm, x, weights[0], self.eps)

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


class _NoContext:
    """Stands for autograd's context where nothing is to be differentiated."""

    needs_input_grad = (False,)

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def _call(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """A function with a gradient of its own; in a decoding step, autograd's ceremony would cost more than the work."""
    if torch.is_grad_enabled():
        return function.apply(*inputs)
    return function.forward(_NoContext(), *inputs)


class _LoRA(torch.autograd.Function):
    """`x Wᵀ + b + (x downᵀ) upᵀ` with W frozen: one pass over the output instead of three, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        inner = x @ down.T
        ctx.save_for_backward(x, weight, down, up, inner)
        return nnf.linear(x, weight, bias).addmm_(inner, up.T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        (grad,) = grads
        narrow = grad @ up
        whole = (grad @ weight).addmm_(narrow, down) if ctx.needs_input_grad[0] else None
        return whole, None, None, narrow.T @ x, grad.T @ inner


class _Turn(torch.autograd.Function):
    """Rotary positions (Su et al. 2021) on the first heads: pairs of numbers as complex ones, times exp(i · angle)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor, heads: int) -> Tensor:
        ctx.turns, ctx.heads = turns, heads
        return _turned(x, turns, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _turned(grads[0], ctx.turns.conj(), ctx.heads), None, None


def _turned(x: Tensor, turns: Tensor, heads: int) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    part = y[..., :heads, :]
    if x.dtype == torch.float32:
        torch.view_as_complex(part.unflatten(-1, (-1, 2))).mul_(turns)
    else:
        turned = torch.view_as_complex(part.float().unflatten(-1, (-1, 2))) * turns
        part.copy_(torch.view_as_real(turned).flatten(-2))
    return y


def _turned_plainly(x: Tensor, turns: Tensor, heads: int) -> Tensor:
    """The same without complex numbers, as a compiler can fuse it, and its gradient; `turns` are [L, 1, half, 2]."""
    part = x[..., :heads, :].float().unflatten(-1, (-1, 2))
    (a, b), (cos, sin) = part.unbind(-1), turns.unbind(-1)
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., heads:, :]], -2)


def _gated_plainly(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return nnf.silu(gate) * up


class _Gate(torch.autograd.Function):
    """`silu(gate) · up` of the two halves, keeping only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return nnf.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        out = torch.empty_like(x)
        to_gate, to_up = out.chunk(2, -1)
        torch.mul(grads[0], nnf.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=to_gate)
        return out


class _RMSNorm(torch.autograd.Function):
    """`x · w / rms(x)` (Zhang & Sennrich 2019): four passes over the gradient instead of ten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0] * weight
        along = (torch.linalg.vecdot(grad, x)[..., None] * scale.pow(3).div_(-x.shape[-1])).to(x.dtype)
        of_weight = (grads[0] * x * scale).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad.mul_(scale).addcmul_(x, along), of_weight, None


def _gelu_of_few(x: Tensor) -> Tensor:
    """GPT-2's GELU by way of a sigmoid: on what a CPU's cache holds, in a third of the time of torch's kernel."""
    if x.numel() > 1 << 17 or x.device.type != "cpu":
        return nnf.gelu(x, approximate="tanh")
    twice, exact = 1.5957691216057308, x.float()  # 2 √(2/π); (1 + tanh u) / 2 is the sigmoid of 2u
    slope = torch.addcmul(exact.new_full((), twice), exact, exact, value=twice * 0.044715)
    return slope.mul_(exact).sigmoid_().mul_(exact).to(x.dtype)


def _take(x: Float[Tensor, "B L D"], at: Int[Tensor, "B T"] | slice) -> Float[Tensor, "B T D"]:
    if isinstance(at, slice):
        return x[:, at]
    first = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (first + at).flatten()).view(*at.shape, -1)


def body_of(model: Any) -> Any:
    """The model without its head, and without peft around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix, inner)


def _blocks(body: Any) -> Iterator[_Block]:
    if hasattr(body, "h"):
        for b in body.h:
            yield _Block(b.ln_1, (b.attn.c_attn,), b.attn.c_proj, b.ln_2, (b.mlp.c_fc,), b.mlp.c_proj)
        return
    for b in body.layers:
        a, m = b.self_attn, b.mlp
        norms = (a.q_norm, a.k_norm) if hasattr(a, "q_norm") else None
        yield _Block(
            b.input_layernorm, (a.q_proj, a.k_proj, a.v_proj), a.o_proj,
            b.post_attention_layernorm, (m.gate_proj, m.up_proj), m.down_proj, norms,
        )  # fmt: skip


def _norm_weights(module: Any) -> tuple[Tensor, ...]:
    return tuple(p for p in (module.weight, getattr(module, "bias", None)) if p is not None)


def _joined(parts: list[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()


def tensors_of(parts: Any) -> Iterator[Tensor]:
    """The tensors of layers, in a fixed order."""
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif part is not None:
            yield from tensors_of(part)


def state_of(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """Changes when the weight does, as far as torch counts: not where `.data` or a fused optimizer writes."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version, weight.dtype


def _linears(block: _Block) -> tuple[Any, ...]:
    return (*block.qkv, block.out, *block.up, block.down)


def _modules(block: _Block) -> tuple[Any, ...]:
    return (block.first_norm, *_linears(block), block.second_norm, *(block.head_norms or ()))


def _tensors(module: Any, adapter: str | None) -> list[Tensor]:
    """The tensors that a fused projection is made of."""
    base = getattr(module, "base_layer", module)
    found = [base.weight, *([base.bias] if getattr(base, "bias", None) is not None else [])]
    if adapter in getattr(module, "lora_A", ()):
        found += [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
    return found


def _width(module: Any) -> int:
    base = getattr(module, "base_layer", module)
    return base.weight.shape[0] if isinstance(base, nn.Linear) else base.weight.shape[1]
