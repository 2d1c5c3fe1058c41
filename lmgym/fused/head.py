"""The output head: log-probabilities of chosen tokens, and sampling of new ones, from hidden states.

The logits of all tokens of a rollout would be the largest tensor of an update: 64 rows of 48 tokens over a vocabulary
of 32,000 take 400 MB, and autograd would save several copies. Here logits are computed for one chunk of tokens at a
time, together with the gradient of each log-probability with respect to its hidden state.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as nnf

from lmgym.fused.onednn import PackedLinear
from lmgym.sampling import search, unpack_bits

CHUNK_LOGITS = 1 << 21
"""The number of logits in memory at a time."""
BLOCK = 128
"""Sampling from a large vocabulary first chooses a block of this many tokens."""
LARGE = 12 * BLOCK
"""Vocabularies of at least this many tokens are sampled by blocks; for smaller ones that would be slower."""


class Head(NamedTuple):
    """The output projection, and the temperature that divides the logits.

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        temperature: of sampling and scoring.
        packed: the same weight packed for a CPU; None where packing is not used.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, " V"] | None
    temperature: float
    packed: PackedLinear | None = None

    def logits(
        self,
        hidden: Float[Tensor, "N D"],
        added: Float[Tensor, " V"] | None = None,
        scratch: "ScratchMemory | None" = None,
    ) -> Float[Tensor, "N V"]:
        """Logits divided by the temperature, in float32. The caller may overwrite them.

        Args:
            hidden: the last hidden states.
            added: is added to every row of the logits, like a bias.
            scratch: memory for the result, to be reused; on a CPU, allocation would take half of the time.
        """
        bias = self.bias
        if self.temperature != 1:
            hidden = hidden / self.temperature
            bias = None if bias is None else bias / self.temperature
        if added is not None:
            bias = added if bias is None else bias + added
        shape = (len(hidden), len(self.weight))
        if self.packed is not None:
            out = self.packed._replace(bias=bias)(hidden)
        elif scratch is None:
            out = nnf.linear(hidden, self.weight, bias)
        else:
            out = scratch.tensor("logits", shape, hidden.dtype, hidden.device)
            if bias is None:
                torch.mm(hidden, self.weight.T, out=out)
            else:
                torch.addmm(bias, hidden, self.weight.T, out=out)
        if out.dtype == torch.float32 or scratch is None:
            return out.float()
        return scratch.tensor("float logits", shape, torch.float32, hidden.device).copy_(out)


class ScratchMemory:
    """Memory that is reused in every step of a rollout."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the next call with the same name and shape returns the same memory."""
        held = self._held.get(name)
        if held is None or held.shape != shape or held.dtype != dtype or held.device != device:
            held = self._held[name] = torch.empty(shape, dtype=dtype, device=device)
        return held


class TokenMask(NamedTuple):
    """A mask [T, V] of allowed tokens, split into a bias for all steps and the few columns that differ between steps.

    Attributes:
        added: [V] `mask_value` on the tokens that are forbidden at every step, else 0.
        columns: [K] the tokens that are allowed at some steps and forbidden at others.
        forbidden: [T, K] True at the steps where these are forbidden.
    """

    added: Float[Tensor, " V"]
    columns: Int[Tensor, " K"]
    forbidden: Bool[Tensor, "T K"]

    @classmethod
    def of(cls, allowed: Bool[Tensor, "T V"], dtype: torch.dtype) -> "TokenMask":
        """Splits a mask. The result should be cached: counting the columns synchronises with the device."""
        never = ~allowed.any(0)
        columns = (~allowed.all(0) & ~never).nonzero()[:, 0]
        added = torch.zeros(len(never), dtype=dtype, device=allowed.device).masked_fill_(never, mask_value(dtype))
        return cls(added, columns, ~allowed[:, columns])


def mask_value(dtype: torch.dtype) -> float:
    """A finite replacement for −∞, so that its product with 0 is 0 and not NaN."""
    return torch.finfo(dtype).min / 4


class _Steps(NamedTuple):
    """The masks of N = B · T tokens, in row-major order."""

    mask: TokenMask
    bits: UInt8[Tensor, "N W"] | None

    def logits(self, head: Head, hidden: Tensor, part: slice) -> Tensor:
        logits = head.logits(hidden[part], self.mask.added)
        low = mask_value(head.weight.dtype)
        if len(self.mask.columns):
            steps = len(self.mask.forbidden)
            at = torch.arange(part.start, part.start + len(logits), device=logits.device) % steps
            few = logits[:, self.mask.columns].masked_fill(self.mask.forbidden[at], low)
            logits[:, self.mask.columns] = few
        if self.bits is not None:
            logits.masked_fill_(~unpack_bits(self.bits[part], logits.shape[1]), low)
        return logits


class _Chosen(torch.autograd.Function):
    """Log-probabilities of chosen tokens, and entropies, from hidden states.

    The forward pass computes d log p(a)/dh = (W_a − Σ_v p_v W_v) / temperature from the same logits. The gradient of
    the entropy is rarely needed; the backward pass computes its logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, token: Tensor, head: Head, steps: _Steps, entropies: bool
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        logp = torch.empty(len(hidden), device=hidden.device)
        entropy = torch.zeros_like(logp)
        slope = torch.empty_like(hidden) if wanted else None
        for part in _parts(len(hidden), len(head.weight)):
            logits = steps.logits(head, hidden, part)
            logits.sub_(logits.amax(-1, keepdim=True))
            chosen = logits.gather(1, token[part, None])
            weights = logits.exp()
            total = weights.sum(-1, keepdim=True)
            found = (chosen - total.log())[:, 0]
            logp[part] = found.masked_fill_(chosen[:, 0] < mask_value(head.weight.dtype) / 2, -torch.inf)
            if entropies:
                entropy[part] = (total.log() - logits.mul_(weights).sum(-1, keepdim=True) / total)[:, 0]
            if slope is not None:
                mean = (weights.to(head.weight.dtype) @ head.weight).div_(total)
                slope[part] = nnf.embedding(token[part], head.weight).sub_(mean).div_(head.temperature)
        ctx.head, ctx.steps = head, steps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(slope, hidden, entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        slope, hidden, entropy = ctx.saved_tensors
        of_logp, of_entropy = grads
        total = None if of_logp is None else slope * of_logp[:, None].to(slope.dtype)
        if of_entropy is not None:
            # dH/dlogit_v = −p_v (log p_v + H)
            by_entropy = torch.empty_like(hidden)
            for part in _parts(len(hidden), len(ctx.head.weight)):
                logp = ctx.steps.logits(ctx.head, hidden, part).log_softmax(-1)
                down = logp.exp().mul_(logp.add_(entropy[part, None])).mul_(-of_entropy[part, None])
                by_entropy[part] = (down.to(hidden.dtype) @ ctx.head.weight).div_(ctx.head.temperature)
            total = by_entropy if total is None else total + by_entropy
        return total, None, None, None, None


def _parts(tokens: int, vocabulary: int) -> list[slice]:
    size = max(32, CHUNK_LOGITS // vocabulary)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def chosen_log_probs_from_hidden(
    hidden: Float[Tensor, "B T D"],
    token: Int[Tensor, "B T"],
    head: Head,
    mask: TokenMask,
    bits: UInt8[Tensor, "B T W"] | None = None,
    entropies: bool = True,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Log-probabilities of chosen tokens, and entropies of their distributions, in nats and float32.

    Both are differentiable with respect to the hidden states. The head must be frozen.

    Args:
        hidden: the states from which the tokens were chosen.
        token: the tokens.
        head: the output projection.
        mask: the tokens that were allowed.
        bits: the tokens that the rows' own masks allowed: of truncated sampling, or of the text so far.
        entropies: whether to compute the entropies; zeros otherwise.

    Returns:
        Log-probabilities, −∞ for tokens that were not allowed; and entropies.
    """
    steps = _Steps(mask, None if bits is None else bits.flatten(0, 1))
    found = _Chosen.apply(hidden.flatten(0, 1), token.flatten(), head, steps, entropies)
    logp, entropy = found  # pyright: ignore[reportGeneralTypeIssues]
    return logp.view(token.shape), entropy.view(token.shape)


def draw_from_logits(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]
) -> tuple[Int[Tensor, " B"], Float[Tensor, " B"]]:
    """Draws tokens by inverse CDF, like `lmgym.sampling.draw`, with their log-probabilities; overwrites the logits.

    For a large vocabulary it finds the block of the token first and then the token in the block, which avoids a
    cumulative sum over the whole vocabulary.
    """
    weights = torch.softmax(logits, -1, out=logits)
    vocabulary = weights.shape[1]
    if vocabulary < LARGE:
        token, total = search(weights.cumsum(-1), uniform[:, None])
    else:
        whole = vocabulary // BLOCK
        sums = weights[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).sum(-1)
        if whole * BLOCK < vocabulary:
            sums = torch.cat([sums, weights[:, whole * BLOCK :].sum(-1, keepdim=True)], 1)
        upto = sums.cumsum(-1)
        block, total = search(upto, uniform[:, None])
        before = (upto - sums).gather(1, block)
        inside = block * BLOCK + torch.arange(BLOCK, device=logits.device)
        part = weights.gather(1, inside.clamp(max=vocabulary - 1)).masked_fill_(inside >= vocabulary, 0.0)
        within = part.cumsum(-1)
        rest = ((uniform[:, None] * total - before) / within[:, -1:]).clamp_(0, 1)
        token = block * BLOCK + search(within, rest)[0]
    return token[:, 0], (weights.gather(1, token) / total).log_()[:, 0]
