"""Gradient checkpointing of a transformers model's own layers; that of the fused pass is in `lmgym.fused`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from lmgym.fused import recomputed, recomputes
from lmgym.models.large_packages import modeling_layers


@contextmanager
def checkpointed_layers(
    model: nn.Module, again: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Iterator[None]:
    """Forward passes of a transformers model inside the body obey `lmgym.fused.gradient_checkpointing`.

    transformers has a switch of its own, but it works in training mode alone, in which some models use dropout.

    Args:
        model: the model.
        again: the context in which the backward pass computes a layer again, such as the adapter of the first pass.

    Raises:
        ValueError: gradient checkpointing is on, and the model's layers do not support it.
    """
    layers = _outermost_layers(model) if recomputes() else []
    for layer in layers:
        layer.forward = partial(_recomputed_layer, layer.forward, again)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the method of the class is visible again


def _recomputed_layer(
    forward: Callable[..., Any], again: Callable[[], AbstractContextManager[Any]], *inputs: Any, **more: Any
) -> Any:
    # A layer that is computed again would write into the cache again. Nothing reads the cache of such a pass.
    more |= {name: None for name in ("past_key_values", "past_key_value", "layer_past") if name in more}
    return recomputed(partial(forward, **more), *inputs, context_fn=lambda: (nullcontext(), again()))


def _outermost_layers(model: nn.Module) -> list[nn.Module]:
    """The layers to checkpoint. A layer inside another one is computed again with it."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # a module comes before those inside it
        if isinstance(module, modeling_layers.GradientCheckpointingLayer) and not any(
            name.startswith(f"{outer}.") for outer in found
        ):
            found[name] = module
    if not found:
        raise ValueError(
            f"gradient checkpointing needs layers of transformers' type GradientCheckpointingLayer, and "
            f"{type(model).__name__} has none: leave gradient_checkpointing off, and set a smaller micro_tokens"
        )
    return list(found.values())
