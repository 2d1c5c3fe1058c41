"""Sampling a token: inverse CDF, truncation to the most probable tokens, and truncation masks packed as bits."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


def draw(logp: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """Draws a token per row by inverse CDF: the first whose cumulative probability exceeds `uniform`, in [0, 1).

    `uniform` is the only source of randomness, so that the tokens of a row depend on its own numbers alone.
    """
    return search(logp.exp().cumsum(-1), uniform[:, None])[0][:, 0]


def search(
    cumulative: Float[Tensor, "B V"], share: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """The first index whose cumulative weight exceeds a share of the total, and the total."""
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that the search stops at a token of positive probability.
    threshold = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    # If the weights are not finite, no index is right. The log-probability is then not finite either, and the learner
    # checks for that.
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[-1] - 1), total


def most_probable(logp: Float[Tensor, "*shape V"], top_k: int = 0, top_p: float = 1.0) -> Bool[Tensor, "*shape V"]:
    """True on the `top_k` most probable tokens, and of these on the fewest that hold `top_p` of the probability.

    Top-k: Fan et al. 2018. Top-p, or nucleus: Holtzman et al. 2020. The most probable token is always in.

    Args:
        logp: log-probabilities, −∞ for banned tokens.
        top_k: a number of tokens; 0 keeps all.
        top_p: a probability; 1 keeps all.
    """
    ordered, index = logp.sort(dim=-1, descending=True, stable=True)
    kept = ordered > -torch.inf
    if top_k:
        kept &= torch.arange(logp.shape[-1], device=logp.device) < top_k
    if top_p < 1:
        probs = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
        kept &= probs.cumsum(-1) - probs < top_p  # the tokens before it hold less than top_p
    return torch.zeros_like(kept).scatter(-1, index, kept)


@dataclass(frozen=True)
class Truncation:
    """Truncated sampling: top-k, top-p, or both.

    Attributes:
        top_k: samples from this many most probable tokens; 0 from all.
        top_p: samples from the fewest most probable tokens that hold this much probability; 1 from all.
        judge: the adapter whose probabilities decide; None is the base model.

    Raises:
        ValueError: `top_k` is negative, or `top_p` is not in (0, 1].
    """

    top_k: int = 0
    top_p: float = 1.0
    judge: str | None = None

    def __post_init__(self) -> None:
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"top_k={self.top_k} must not be negative, and top_p={self.top_p} must lie in (0, 1]")

    @property
    def active(self) -> bool:
        """Whether any token can be left out."""
        return self.top_k > 0 or self.top_p < 1

    def mask(
        self, logits: Float[Tensor, "*shape V"], temperature: float, action_mask: Bool[Tensor, "*mask V"]
    ) -> Bool[Tensor, "*shape V"]:
        """True on the allowed tokens that may be sampled, given the judge's logits."""
        return most_probable(log_probs(logits, temperature, action_mask), self.top_k, self.top_p)


def packed_width(vocabulary: int) -> int:
    """The number of bytes that hold one bit per token."""
    return -(-vocabulary // 8)


def pack_bits(mask: Bool[Tensor, "*shape V"]) -> UInt8[Tensor, "*shape W"]:
    """Packs a mask into one bit per token: W = ⌈V / 8⌉ bytes."""
    vocabulary = mask.shape[-1]
    whole = torch.nn.functional.pad(mask, (0, packed_width(vocabulary) * 8 - vocabulary)).unflatten(-1, (-1, 8))
    return (whole * _bits(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "*shape W"], vocabulary: int) -> Bool[Tensor, "*shape V"]:
    """The inverse of `pack_bits`."""
    return ((packed[..., None] & _bits(packed.device)) > 0).flatten(-2)[..., :vocabulary]


def _bits(device: torch.device) -> UInt8[Tensor, " 8"]:
    # Created on the device: a copy from the host in each decoding step would synchronise with the device.
    return torch.ones(8, dtype=torch.uint8, device=device) << torch.arange(8, dtype=torch.uint8, device=device)


def log_probs(
    logits: Float[Tensor, "*shape V"], temperature: float, action_mask: Bool[Tensor, "*mask V"]
) -> Float[Tensor, "*shape V"]:
    """Log-probabilities in float32 at a temperature, −∞ for banned tokens.

    Sampling and scoring both call this function, so that a token is scored under the distribution it was drawn from.
    """
    return (logits.float() / temperature).masked_fill(~action_mask, -torch.inf).log_softmax(-1)


def chosen_log_probs(
    logits: Float[Tensor, "*shape V"],
    chosen: Int[Tensor, "*shape"],
    temperature: float,
    action_mask: Bool[Tensor, "*mask V"],
) -> Float[Tensor, "*shape"]:
    """The log-probability of chosen tokens, finite for banned ones too.

    Agents that ignore action masks may choose banned tokens. These get their log-probability without the mask, which is
    finite.
    """
    scaled = logits.float() / temperature
    index = chosen[..., None]
    allowed = action_mask.expand(scaled.shape).gather(-1, index)
    masked = scaled.masked_fill(~action_mask, -torch.inf).logsumexp(-1, keepdim=True)
    return (scaled.gather(-1, index) - torch.where(allowed, masked, scaled.logsumexp(-1, keepdim=True)))[..., 0]
