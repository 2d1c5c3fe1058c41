"""Gradient checkpointing: a layer keeps only its input, and the backward pass computes the rest again.

Chen et al. 2016 (https://arxiv.org/abs/1604.06174). The same operations on the same numbers run twice, so the gradients
are the same to the last bit. A step of an adapter takes about half longer, one of all weights a third.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

_on: ContextVar[bool] = ContextVar("gradient checkpointing", default=False)


@contextmanager
def gradient_checkpointing(on: bool = True) -> Iterator[None]:
    """Passes inside the body that are differentiated keep only the input of every layer, if `on`."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def recomputes() -> bool:
    """Whether the present pass is differentiated with gradient checkpointing."""
    # torch.compile cannot look into a context variable; the learner refuses it together with gradient checkpointing.
    return not torch.compiler.is_compiling() and _on.get() and torch.is_grad_enabled()


def recomputed(function: Callable[..., Any], *inputs: Any, **more: Any) -> Any:
    """`function(*inputs)`; with gradient checkpointing, its intermediate results are computed again when needed."""
    if not recomputes():
        return function(*inputs)
    # Nothing that is recomputed draws random numbers.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **more)
