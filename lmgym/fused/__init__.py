"""The fused forward pass of the GPT-2 and Llama families: faster than transformers, and tested to give the same."""

from lmgym.fused.architectures import body_of, unsupported_adapter_reason, unsupported_reason
from lmgym.fused.forward import FusedModel
from lmgym.fused.frozen_prefix import FrozenPrefix
from lmgym.fused.head import (
    Head,
    ScratchMemory,
    TokenMask,
    chosen_log_probs_from_hidden,
    draw_from_logits,
    mask_value,
)
from lmgym.fused.kernels import gather_positions
from lmgym.fused.kv_cache import KVCache
from lmgym.fused.onednn import PackedLinear, can_pack, pack_linear
from lmgym.fused.recompute import gradient_checkpointing, recomputed, recomputes
from lmgym.fused.weights import Layer, tensors_of, weight_version

__all__ = [
    "FrozenPrefix",
    "FusedModel",
    "Head",
    "KVCache",
    "Layer",
    "PackedLinear",
    "ScratchMemory",
    "TokenMask",
    "body_of",
    "can_pack",
    "chosen_log_probs_from_hidden",
    "draw_from_logits",
    "gather_positions",
    "gradient_checkpointing",
    "mask_value",
    "pack_linear",
    "recomputed",
    "recomputes",
    "tensors_of",
    "unsupported_adapter_reason",
    "unsupported_reason",
    "weight_version",
]
