"""The negative log-likelihood of texts, for maximum-likelihood training."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils.checkpoint import checkpoint

from lmgym.models.language_model import LanguageModel
from lmgym.models.sequences import Sequences

CHUNK_LOGITS = 1 << 23
"""The number of logits in memory at a time. Fewer than these are computed at once."""


def token_nll(lm: LanguageModel, sequences: Sequences, adapter: str | None = None) -> Float[Tensor, "B T"]:
    """The negative log-likelihood of each token in nats, over the whole vocabulary, differentiable.

    The logits of a batch can be its largest tensor, and autograd would keep several copies of them. So they are
    computed for some tokens at a time, and again in the backward pass. Unlike a policy's, this head may be trained.
    """
    tokens = sequences.tokens
    if lm.fused(adapter) is None or tokens.numel() * lm.vocabulary <= CHUNK_LOGITS:
        logits, _ = lm.evaluate(sequences, adapter)
        return _nll(logits.flatten(0, 1), tokens.flatten()).view_as(tokens)
    head = lm.model.get_output_embeddings()

    def of_chunk(hidden: Tensor, token: Tensor) -> Tensor:
        return _nll(nnf.linear(hidden, head.weight, head.bias), token)

    size = max(1, CHUNK_LOGITS // lm.vocabulary)
    chunks = zip(lm.hidden(sequences, adapter).flatten(0, 1).split(size), tokens.flatten().split(size), strict=True)
    if torch.is_grad_enabled():
        found = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    else:
        found = [of_chunk(*chunk) for chunk in chunks]
    return torch.cat(found).view_as(tokens)


def _nll(logits: Tensor, token: Tensor) -> Tensor:
    return nnf.cross_entropy(logits.float(), token, reduction="none")
