"""A few small passes over a newly loaded model, to find out whether it can be used, and how.

Most architectures decode from left-padded rows with a cache. Some count padding as positions or have no usable cache,
and some are not causal at all. Nothing that a model says about itself tells that reliably, so it is tried out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lmgym.models.safe_weights import first_line
from lmgym.models.transformers_decoding import TransformersPass
from lmgym.models.transformers_quirks import silence_libraries

PREFIX = 4
"""Tokens that two probe texts share."""
STEPS = 2
"""Tokens that follow, and are decoded with the cache."""
LENGTH = PREFIX + STEPS


@torch.no_grad()
def probe_architecture(model: TransformersPass, candidates: Sequence[int]) -> bool:
    """Whether decoding with left-padded rows and the model's cache gives what whole texts alone give.

    Args:
        model: the passes of a model, without adapters.
        candidates: tokens that are text.

    Raises:
        ValueError: the model cannot be used: its passes fail, give logits that are not finite, or a token's logits
            depend on the tokens after it.
    """
    name, family = model.adapters.name, model.adapters.model.config.model_type
    tokens = [candidates[i * (len(candidates) - 1) // (LENGTH - 1)] for i in range(LENGTH)]
    device = model.adapters.model.device
    # The same prefix with another suffix.
    texts = torch.tensor([tokens, tokens[:PREFIX] + tokens[:STEPS]], device=device)
    try:
        with silence_libraries():
            whole, _ = model.read(None, texts, slice(0, LENGTH))
    except Exception as error:  # the code of a model may raise anything
        raise ValueError(
            f"the model {name!r} ({family}) cannot be used: a pass over {LENGTH} tokens fails with "
            f"{type(error).__name__} ({first_line(error)}); a text model that predicts the next token is needed"
        ) from error
    if not bool(torch.isfinite(whole).all()):
        raise ValueError(f"the model {name!r} gives logits that are not finite: its weights are damaged")
    if not _equal(whole[0, :PREFIX], whole[1, :PREFIX], model.adapters.model.dtype):
        raise ValueError(
            f"the model {name!r} ({family}) is not causal: the logits of a token change with the tokens after it. A "
            "model that predicts the next token is needed; an encoder can only be a reward model"
        )
    with silence_libraries():
        return _cache_is_exact(model, texts, whole)


def _cache_is_exact(model: TransformersPass, texts: Tensor, whole: Tensor) -> bool:
    """Whether a short prompt beside a longer one gives what the whole texts gave, at the prompts and at two steps."""
    short = PREFIX // 2
    mask = torch.ones_like(texts[:, :PREFIX])
    mask[0, :short] = 0
    prompts = texts[:, :PREFIX].clone()
    prompts[0] = prompts[0].roll(short)
    at = torch.tensor([short, PREFIX], device=texts.device)
    rows = torch.arange(2, device=texts.device)
    try:
        decoding = model.start(prompts, mask, None)
        for step in range(STEPS + 1):
            if step:
                decoding = decoding.advance(texts[rows, at + step - 1])
            if not _equal(decoding.logits, whole[rows, at + step - 1], model.adapters.model.dtype):
                return False
    except Exception:  # a model without a cache, or with one of its own kind, may raise anything
        return False
    return True


def _equal(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits of a model of this dtype differ by no more than rounding does.

    A fault moves them by the order of their spread, rounding by that of their magnitude.
    """
    found, expected = found.float(), expected.float()
    rounding = 8 * torch.finfo(dtype).eps * float(expected.abs().max())
    return float((found - expected).abs().max()) <= 1e-4 * float(expected.std()) + rounding
