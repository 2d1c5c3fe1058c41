"""What fits into memory: the tokens of a pass of training, and the rows that are decoded at a time.

The tokens of a pass are the memory that its activations may take, over the bytes of one token. The estimate counts what
autograd keeps of every layer. It is meant to be right within a factor of about 1.5: a step that still runs out of
memory is repeated in smaller passes.
"""

from typing import Any, NamedTuple

import torch

from lmgym.devices import free_memory, total_memory
from lmgym.env import TokenVectorEnv
from lmgym.models import LanguageModel
from lmgym.policy import Policy, TokenPolicy
from lmgym.reward import RewardModel

Trained = LanguageModel | TokenPolicy | RewardModel
"""What a pass goes through."""
CEILING = 384 * 2**20
"""Bytes for activations on a CPU. A pass of a few hundred tokens is as fast there as a longer one."""
GPU_SHARE = 4
"""On a GPU, activations may take one part in this many of its memory."""
LEAST = 16 * 2**20
"""Bytes for activations even if no memory seems to be free."""
CACHE = 256 * 2**20
"""Bytes for keys and values on a CPU where completions are only measured or compared."""
LOGITS_KEPT = 6
"""Copies of the logits, in float32, that a pass keeps whose head does not work in chunks."""
LIBRARY_FACTOR = 1.75
"""Bytes of a transformers layer in float32 over those of the fused pass; at most 1.75 was measured (GPT-2's GELU)."""


class Budget(NamedTuple):
    """The memory that the activations of a pass may take.

    Attributes:
        size: in bytes.
        short: whether it is smaller than usual, because little memory is free.
    """

    size: int
    short: bool


def activation_budget(device: torch.device, trained_bytes: int) -> Budget:
    """The memory for the activations of a pass.

    It depends on the free memory only if little is free, so that a run that is repeated has the same passes.

    Args:
        device: where training happens.
        trained_bytes: size of the trained weights. Their gradients and Adam's moments are not allocated yet.
    """
    usual = CEILING if device.type == "cpu" else total_memory(device) // GPU_SHARE
    free, size = free_memory(device), usual
    while free is not None and size > LEAST and size > (free - 3 * trained_bytes) // 2:
        size //= 2
    return Budget(size, size < usual)


def bytes_per_token(model: Trained, recompute: bool = False, whole_logits: bool = False) -> int:
    """Bytes that a pass of training keeps of every token, padding included; 0 if they are not known.

    Args:
        model: what the pass goes through.
        recompute: whether it uses gradient checkpointing.
        whole_logits: whether the loss reads the logits of the whole vocabulary.
    """
    if isinstance(model, Policy):
        found = _of_language_model(model.lm, model.adapter, recompute, whole_logits)
        if model.network is not None:
            return found + _of_language_model(model.network, None, recompute, False)
        return 2 * found if model.critic == "adapter" else found
    if isinstance(model, LanguageModel):
        return _of_language_model(model, None, recompute, whole_logits)
    if isinstance(model, RewardModel):
        return _of_layers(model.model, None, recompute)
    return 0


def _of_language_model(lm: LanguageModel, adapter: str | None, recompute: bool, whole_logits: bool) -> int:
    fused = lm.fused(adapter)
    # With an adapter, autograd keeps nothing of the frozen layers below the lowest one that it changes.
    frozen = None if fused is None else 0 if adapter is None else fused.weights.frozen_layers(adapter)
    logits = 4 * LOGITS_KEPT * lm.vocabulary if fused is None or whole_logits else 0
    return _of_layers(lm.model, frozen, recompute) + logits


def _of_layers(model: Any, frozen: int | None, recompute: bool) -> int:
    """Bytes of the layers; `frozen` is None for a pass through transformers' own layers."""
    config = model.config.get_text_config()
    width, layers, heads, kv_heads, head_size = _sizes(config)
    inner = _count(config, "intermediate_size", "n_inner", other=4 * width)
    # Input, sum and the two norms; the MLP; queries, keys, values and the output of attention.
    plain = 4 * width + (3 if hasattr(config, "num_key_value_heads") else 2) * inner
    attention = (2 * heads + 2 * kv_heads) * head_size
    size = model.dtype.itemsize
    if frozen is None:
        each = int(4 * LIBRARY_FACTOR * (plain + attention))
    else:  # on a CPU, attention in float32
        each = size * plain + (4 if model.device.type == "cpu" else size) * attention
    trained = layers - (frozen or 0)
    head = 4 * size * width
    # Two layers more: the gradients inside the layer that the backward pass is in.
    return head + (trained * size * width + 3 * each if recompute else (trained + 2) * each)


def decoding_slots(policy: TokenPolicy, env: TokenVectorEnv) -> int:
    """How many rows to decode at a time, so that their keys and values take at most `CACHE`; 0 for all of them."""
    if not isinstance(policy, Policy) or env.on_limit == "truncate" or policy.device.type != "cpu":
        return 0
    _, layers, _, kv_heads, head_size = _sizes(policy.lm.model.config.get_text_config())
    row = (env.max_prompt_tokens + env.max_new_tokens) * 2 * layers * kv_heads * head_size * 4
    return 0 if row * env.num_envs <= CACHE else max(1, CACHE // row)


def _sizes(config: Any) -> tuple[int, int, int, int, int]:
    """Width, layers, heads, heads of keys and values, and numbers in a head; a guess where a family has other names."""
    width = config.hidden_size
    heads = _count(config, "num_attention_heads", other=max(1, width // 64))
    layers, kv_heads = _count(config, "num_hidden_layers", other=32), _count(config, "num_key_value_heads", other=heads)
    return width, layers, heads, kv_heads, _count(config, "head_dim", other=width // heads)


def _count(config: Any, *names: str, other: int) -> int:
    """The first of these settings that is a number, or the largest of its numbers if it has one for each layer."""
    for name in names:
        value = getattr(config, name, None)
        value = max(value, default=0) if isinstance(value, (list, tuple)) else value
        if isinstance(value, int) and value > 0:
            return value
    return other
