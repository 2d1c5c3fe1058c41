"""The layers of a model that LoRA can adapt."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lmgym.fused import unsupported_reason
from lmgym.models.transformers_quirks import silence_libraries

_PEFT_REFUSES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")
"""Model types in which peft refuses to adapt `out_proj`, whose weight fast kernels read past the module."""


def linear_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers of a transformers model, by name, as peft wraps them if it does."""
    for name, module in model.named_modules():
        linear = isinstance(getattr(module, "base_layer", module), (nn.Linear, Conv1D))
        if linear and "lora_" not in name and not name.endswith("base_layer"):
            yield name, module


def all_linear(model: Any, head: nn.Module) -> str | list[str]:
    """All layers to adapt but the head, in peft's form: "all-linear", or their names if some cannot be adapted."""
    left_out = unadaptable(model)
    if not left_out:
        return "all-linear"
    return [name for name, module in linear_layers(model) if module is not head and name not in left_out]


def unadaptable(model: Any) -> set[str]:
    """The linear layers that a pass over text does not run, so that an adapter there would do nothing.

    They belong to other modalities, to cross-attention without an encoder, or to layers that read the weight itself, as
    in Mamba. Layers that return more than a tensor, such as some routers of experts, cannot be adapted either.
    """
    if unsupported_reason(model) is None:
        return set()
    layers = list(linear_layers(model))
    ran: set[nn.Module] = set()

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            ran.add(module)

    hooks = [module.register_forward_hook(note) for _, module in layers]
    try:
        with torch.no_grad(), silence_libraries():
            model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=model.device), use_cache=False)
    except Exception:  # such as a head that looks for an end of sequence: whoever uses the model will say so
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    refused = model.config.model_type in _PEFT_REFUSES
    return {
        name
        for name, module in layers
        # Which experts run depends on the tokens.
        if (module not in ran and "expert" not in name) or (refused and name.endswith("out_proj"))
    }
