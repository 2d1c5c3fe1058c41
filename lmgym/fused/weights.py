"""The weights of a GPT-2 or Llama model, fused for few and large products."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as nnf

from lmgym.fused.kernels import LoRA
from lmgym.fused.onednn import PackedLinear

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
            y = LoRA.apply(flat, self.weight, self.bias, down, up)
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
    qkv: Projection | PackedLinear
    out: Projection | PackedLinear
    second_norm: tuple[Tensor, ...]
    up: Projection | PackedLinear
    down: Projection | PackedLinear
    head_norms: tuple[Tensor, Tensor] | None


@dataclass
class Block:
    """The modules of one layer, as they stand in the model."""

    first_norm: Any
    qkv: Sequence[Any]
    out: Any
    second_norm: Any
    up: Sequence[Any]
    down: Any
    head_norms: tuple[Any, Any] | None = None


def body_of(model: Any) -> Any:
    """The model without its head, and without peft around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix, inner)


def blocks_of(body: Any) -> Iterator[Block]:
    """The layers of a model, with the names of GPT-2 and Llama unified."""
    if hasattr(body, "h"):
        for b in body.h:
            yield Block(b.ln_1, (b.attn.c_attn,), b.attn.c_proj, b.ln_2, (b.mlp.c_fc,), b.mlp.c_proj)
        return
    for b in body.layers:
        a, m = b.self_attn, b.mlp
        norms = (a.q_norm, a.k_norm) if hasattr(a, "q_norm") else None
        yield Block(
            b.input_layernorm, (a.q_proj, a.k_proj, a.v_proj), a.o_proj,
            b.post_attention_layernorm, (m.gate_proj, m.up_proj), m.down_proj, norms,
        )  # fmt: skip


def norm_weights(module: Any) -> tuple[Tensor, ...]:
    """Weight, and bias where there is one, of a normalisation."""
    return tuple(p for p in (module.weight, getattr(module, "bias", None)) if p is not None)


def joined(parts: list[Tensor]) -> Tensor:
    """Tensors joined along their first dimension."""
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


def linears_of(block: Block) -> tuple[Any, ...]:
    """All projections of a layer."""
    return (*block.qkv, block.out, *block.up, block.down)


def modules_of(block: Block) -> tuple[Any, ...]:
    """All modules of a layer that hold weights."""
    return (block.first_norm, *linears_of(block), block.second_norm, *(block.head_norms or ()))


def weights_of(module: Any, adapter: str | None) -> list[Tensor]:
    """The tensors that a fused projection is made of."""
    base = getattr(module, "base_layer", module)
    found = [base.weight, *([base.bias] if getattr(base, "bias", None) is not None else [])]
    if adapter in getattr(module, "lora_A", ()):
        found += [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
    return found


def width_of(module: Any) -> int:
    """How many outputs a projection has."""
    base = getattr(module, "base_layer", module)
    return base.weight.shape[0] if isinstance(base, nn.Linear) else base.weight.shape[1]
