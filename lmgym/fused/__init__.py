"""The fused forward pass of the GPT-2 and Llama families: faster than transformers, equal to it in tests."""

from lmgym.fused.forward import Trunk
from lmgym.fused.frozen_prefix import FrozenPrefix
from lmgym.fused.head import Head, Room, TokenMask, chosen_log_probs_of, draw_from, lowest
from lmgym.fused.kv_cache import Cache
from lmgym.fused.onednn import PackedLinear, can_pack, pack_linear
from lmgym.fused.weights import Layer, body_of, state_of, tensors_of

__all__ = [
    "Cache",
    "FrozenPrefix",
    "Head",
    "Layer",
    "PackedLinear",
    "Room",
    "TokenMask",
    "Trunk",
    "body_of",
    "can_pack",
    "chosen_log_probs_of",
    "draw_from",
    "lowest",
    "pack_linear",
    "state_of",
    "tensors_of",
]
