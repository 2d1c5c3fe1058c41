"""The weights of a GPT-2 or Llama model, fused for few and large products."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as nnf

from lmgym.fused.architectures import (
    GATED,
    Block,
    blocks_of,
    body_of,
    has_adapter,
    linears_of,
    modules_of,
    norm_weights,
    output_width,
    weights_of,
)
from lmgym.fused.kernels import LoRA
from lmgym.fused.onednn import PackedLinear, can_pack, pack_linear


class Projection(NamedTuple):
    """`x Wᵀ + b`, plus `(x downᵀ) upᵀ` of a LoRA adapter that is not merged.

    Attributes:
        weight: [out, in].
        bias: [out] or None.
        down: [R, in] the A matrices of all fused parts, stacked; None without an adapter.
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
            y = LoRA.apply(flat, self.weight, self.bias, down, up)
        y = y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])
        return y if residual is None else y.add_(residual)

    def add_to(self, x: Float[Tensor, "N out"], inner: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        """`x + inner Wᵀ + b` in place, with merged weights and without a gradient; the product does the addition."""
        x.addmm_(inner, self.weight.T)
        return x if self.bias is None else x.add_(self.bias)


class Layer(NamedTuple):
    """The fused weights of one transformer layer.

    Attributes:
        first_norm: the weight (and bias, for LayerNorm) of the norm before attention.
        qkv: queries, keys and values in one projection.
        out: the output projection of attention.
        second_norm: the norm before the MLP.
        up: the MLP's input projection; gate and up in one if the MLP is gated.
        down: the MLP's output projection.
        head_norms: weights of the RMSNorms of query and key heads (Qwen3), or None.
    """

    first_norm: tuple[Tensor, ...]
    qkv: Projection | PackedLinear
    out: Projection | PackedLinear
    second_norm: tuple[Tensor, ...]
    up: Projection | PackedLinear
    down: Projection | PackedLinear
    head_norms: tuple[Tensor, Tensor] | None


class FusedWeights:
    """Fuses the weights of a model's layers, and caches what stays the same.

    Args:
        model: a transformers model that `unsupported_reason` accepts.
        head_size: numbers per attention head.
    """

    def __init__(self, model: Any, head_size: int):
        self.body = body_of(model)
        self.rotary = model.config.model_type in GATED
        self.head_size = head_size
        self._cached: dict[tuple[str | None, bool], tuple[list[Any], list[Layer]]] = {}

    def layers(self, adapter: str | None = None, decode: bool = False) -> list[Layer]:
        """The weights of every layer with one adapter switched on, or with none.

        Frozen weights are fused once, and again when torch counts a change in them. Trained weights are fused at every
        call.

        Args:
            adapter: a LoRA adapter.
            decode: whether the weights are for decoding, which needs no gradients. The adapter is then merged into a
                copy of the weights, and on a CPU the copy is packed if that is faster.
        """
        decode = decode and (adapter is not None or can_pack(self.body.device, self.body.dtype))
        if adapter is not None and not decode:
            return [self._add_lora(*pair, adapter) for pair in zip(self.layers(), blocks_of(self.body), strict=True)]
        tensors = [t for block in blocks_of(self.body) for m in modules_of(block) for t in weights_of(m, adapter)]
        trained = any(t.requires_grad for t in tensors)
        versions = [weight_version(t) for t in tensors]
        cached = self._cached.get((adapter, decode))
        if cached is not None and cached[0] == versions and not trained:
            return cached[1]
        # A rollout runs in inference mode, but training must be able to use the tensors made here.
        differentiable = trained and not decode and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
            layers = [self._fuse_layer(block, adapter, decode) for block in blocks_of(self.body)]
        # Trained weights are not cached: the copy would only occupy memory until the next rollout makes another.
        if not trained:
            self._cached[adapter, decode] = (versions, layers)
        elif adapter is None:  # the base may have changed without torch counting it, so all copies of it are outdated
            self._cached.clear()
        else:
            self._cached.pop((adapter, decode), None)
        return layers

    def frozen_layers(self, adapter: str | None) -> int:
        """How many of the lowest layers an adapter leaves unchanged; all of them without an adapter."""
        blocks = list(blocks_of(self.body))
        changed = (i for i, b in enumerate(blocks) if any(has_adapter(m, adapter) for m in linears_of(b)))
        return next(changed, len(blocks))

    def _fuse_layer(self, block: Block, adapter: str | None, decode: bool) -> Layer:
        norms = None
        if block.head_norms is not None:
            norms = (self._interleave(block.head_norms[0].weight), self._interleave(block.head_norms[1].weight))
        return Layer(
            norm_weights(block.first_norm),
            self._fuse_projections(block.qkv, adapter, decode, rotary=self.rotary),
            self._fuse_projections((block.out,), adapter, decode),
            norm_weights(block.second_norm),
            self._fuse_projections(block.up, adapter, decode),
            self._fuse_projections((block.down,), adapter, decode),
            norms,
        )

    def _fuse_projections(
        self, modules: Sequence[Any], adapter: str | None, decode: bool, rotary: bool = False
    ) -> Projection | PackedLinear:
        """One projection for modules with the same input, with the adapter merged into the weights."""
        weights, biases = [], []
        for i, module in enumerate(modules):
            base = getattr(module, "base_layer", module)
            weight = base.weight if isinstance(base, nn.Linear) else base.weight.T  # GPT-2's Conv1D is [in, out]
            if has_adapter(module, adapter):
                delta = module.lora_B[adapter].weight.float() @ module.lora_A[adapter].weight.float()
                weight = (weight.float() + module.scaling[adapter] * delta).to(weight.dtype)
            interleaved = rotary and i < 2  # queries and keys, not values
            weights.append(self._interleave(weight) if interleaved else weight)
            if base.bias is not None:
                biases.append(self._interleave(base.bias) if interleaved else base.bias)
        weight, bias = _concatenate(weights), _concatenate(biases) if biases else None
        return (pack_linear(weight, bias) if decode else None) or Projection(weight, bias)

    def _add_lora(self, layer: Layer, block: Block, adapter: str) -> Layer:
        """A layer with an adapter beside the frozen weights, so that the adapter can be trained."""

        def add(projection: Projection | PackedLinear, modules: Sequence[Any], rotary: bool = False) -> Projection:
            assert isinstance(projection, Projection)
            downs = [module.lora_A[adapter].weight for module in modules if has_adapter(module, adapter)]
            if not downs:
                return projection
            ups, columns = [], 0
            rank = sum(len(down) for down in downs)
            for i, module in enumerate(modules):
                if not has_adapter(module, adapter):
                    ups.append(projection.weight.new_zeros(output_width(module), rank))
                    continue
                up = module.lora_B[adapter].weight * module.scaling[adapter]
                up = self._interleave(up) if rotary and i < 2 else up
                ups.append(nnf.pad(up, (columns, rank - columns - up.shape[1])))
                columns += up.shape[1]
            down, up = (x[0] if len(x) == 1 else torch.cat(x) for x in (downs, ups))
            return projection._replace(down=down, up=up)

        return layer._replace(
            qkv=add(layer.qkv, block.qkv, rotary=self.rotary),
            out=add(layer.out, (block.out,)),
            up=add(layer.up, block.up),
            down=add(layer.down, (block.down,)),
        )

    def _interleave(self, rows: Tensor) -> Tensor:
        """Puts row i of the first half of each head next to row i of its second half.

        A rotation then is a product of complex numbers. Queries and keys are permuted alike, so that their dot products
        stay the same.
        """
        halves = rows.unflatten(0, (-1, 2, self.head_size // 2))
        return halves.transpose(1, 2).flatten(0, 2)


def weight_version(weight: Tensor) -> tuple[int, int, torch.dtype]:
    """A key that changes with the weight, as far as torch counts: writes to `.data` and fused optimizers are missed."""
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version, weight.dtype


def tensors_of(parts: Any) -> Iterator[Tensor]:
    """The tensors of layers, in a fixed order."""
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif part is not None:
            yield from tensors_of(part)


def _concatenate(parts: list[Tensor]) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()
