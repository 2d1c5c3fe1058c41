"""The GPT-2 and Llama families under one set of names, and the reasons why a model or adapter is not supported."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

GATED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types with rotary positions, RMSNorm and a gated MLP. SmolLM and SmolLM2 are of the type llama."""


@dataclass
class Block:
    """The modules of one transformer layer.

    Attributes:
        first_norm: before attention.
        qkv: the projections of queries, keys and values: one joint module (GPT-2) or three (Llama).
        out: the output projection of attention.
        second_norm: before the MLP.
        up: the MLP's input projections: one (GPT-2), or gate and up (Llama).
        down: the MLP's output projection.
        head_norms: the RMSNorms of query and key heads (Qwen3), or None.
    """

    first_norm: Any
    qkv: Sequence[Any]
    out: Any
    second_norm: Any
    up: Sequence[Any]
    down: Any
    head_norms: tuple[Any, Any] | None = None


def unsupported_reason(model: Any) -> str | None:
    """Why the fused pass does not support a transformers model; None if it does."""
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


def unsupported_adapter_reason(model: Any, adapter: str) -> str | None:
    """Why the fused pass does not support an adapter of a model that it supports; None if it does."""
    projections = {id(m) for block in blocks_of(body_of(model)) for m in linears_of(block)}
    for module in model.modules():
        if adapter in getattr(module, "lora_A", ()) or adapter in getattr(module, "lora_embedding_A", ()):
            if id(module) not in projections:
                return f"the adapter {adapter!r} changes more than the layers' projections"
            if adapter in module.lora_variant or module.lora_bias.get(adapter) or module.merged:
                return f"the adapter {adapter!r} is not plain LoRA"
    return None


def body_of(model: Any) -> Any:
    """The model without its head, and without peft around it."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix, inner)


def blocks_of(body: Any) -> Iterator[Block]:
    """The layers of a model, from the lowest."""
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


def linears_of(block: Block) -> tuple[Any, ...]:
    """All projections of a layer."""
    return (*block.qkv, block.out, *block.up, block.down)


def modules_of(block: Block) -> tuple[Any, ...]:
    """All modules of a layer that hold weights."""
    return (block.first_norm, *linears_of(block), block.second_norm, *(block.head_norms or ()))


def has_adapter(module: Any, adapter: str | None) -> bool:
    """Whether a LoRA adapter changes a projection."""
    return adapter in getattr(module, "lora_A", ())


def weights_of(module: Any, adapter: str | None) -> list[Tensor]:
    """The weight and bias of a module, and the LoRA matrices of an adapter."""
    base = getattr(module, "base_layer", module)
    found = [base.weight, *([base.bias] if getattr(base, "bias", None) is not None else [])]
    if has_adapter(module, adapter):
        found += [module.lora_A[adapter].weight, module.lora_B[adapter].weight]
    return found


def norm_weights(module: Any) -> tuple[Tensor, ...]:
    """The weight of a normalisation layer, and its bias if it has one."""
    return tuple(p for p in (module.weight, getattr(module, "bias", None)) if p is not None)


def output_width(module: Any) -> int:
    """The number of outputs of a projection."""
    base = getattr(module, "base_layer", module)
    return base.weight.shape[0] if isinstance(base, nn.Linear) else base.weight.shape[1]
