"""Drawing a token: inverse CDF, truncation to the most probable tokens, and truncations kept as bits for replay."""

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


def draw(logp: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which the cumulative probability passes `uniform`, a number in [0, 1) for each row.

    All of the randomness is in `uniform`, so that a row's tokens depend on nothing but its own numbers.
    """
    return search(logp.exp().cumsum(-1), uniform[:, None])[0][:, 0]


def search(
    cumulative: Float[Tensor, "B V"], share: Float[Tensor, "B 1"]
) -> tuple[Int[Tensor, "B 1"], Float[Tensor, "B 1"]]:
    """Where the cumulative weight passes a share of the total, and the total."""
    total = cumulative[:, -1:]
    # Below the total even after rounding, so that the search stops at a token of positive probability.
    threshold = torch.minimum(share * total, torch.nextafter(total, torch.zeros_like(total)))
    # Where weights are no numbers there is no such place; the log-probability then says so, and a learner looks at it.
    return torch.searchsorted(cumulative, threshold, right=True).clamp_(max=cumulative.shape[-1] - 1), total


def most_probable(logp: Float[Tensor, "*shape V"], top_k: int = 0, top_p: float = 1.0) -> Bool[Tensor, "*shape V"]:
    """True on the `top_k` most probable tokens, and of these on the fewest that hold `top_p` of the probability.

    Top-k: Fan et al. 2018. Top-p, or nucleus: Holtzman et al. 2020. The most probable token is always in.

    Args:
        logp: log-probabilities, −∞ for banned tokens.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
    """
    ordered, index = logp.sort(dim=-1, descending=True, stable=True)
    kept = ordered > -torch.inf
    if top_k:
        kept &= torch.arange(logp.shape[-1], device=logp.device) < top_k
    if top_p < 1:
        probs = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
        kept &= probs.cumsum(-1) - probs < top_p  # what stands before a token has not reached top_p yet
    return torch.zeros_like(kept).scatter(-1, index, kept)


def packed_width(vocabulary: int) -> int:
    """How many bytes hold one bit for each token."""
    return -(-vocabulary // 8)


def pack_bits(mask: Bool[Tensor, "*shape V"]) -> UInt8[Tensor, "*shape W"]:
    """One bit a token: W = ⌈V / 8⌉ bytes."""
    vocabulary = mask.shape[-1]
    whole = torch.nn.functional.pad(mask, (0, packed_width(vocabulary) * 8 - vocabulary)).unflatten(-1, (-1, 8))
    return (whole * _bits(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: UInt8[Tensor, "*shape W"], vocabulary: int) -> Bool[Tensor, "*shape V"]:
    """The inverse of `pack_bits`."""
    return ((packed[..., None] & _bits(packed.device)) > 0).flatten(-2)[..., :vocabulary]


def _bits(device: torch.device) -> UInt8[Tensor, " 8"]:
    # Made on the device: a copy from the host in each decoding step would have to wait for it.
    return torch.ones(8, dtype=torch.uint8, device=device) << torch.arange(8, dtype=torch.uint8, device=device)


def log_probs(
    logits: Float[Tensor, "*shape V"], temperature: float, action_mask: Bool[Tensor, "*mask V"]
) -> Float[Tensor, "*shape V"]:
    """Log-probabilities in float32 at a temperature, −∞ for banned tokens.

    Everyone who samples or scores calls this one function: what was sampled is what is scored.
    """
    return (logits.float() / temperature).masked_fill(~action_mask, -torch.inf).log_softmax(-1)


def chosen_log_probs(
    logits: Float[Tensor, "*shape V"],
    chosen: Int[Tensor, "*shape"],
    temperature: float,
    action_mask: Bool[Tensor, "*mask V"],
) -> Float[Tensor, "*shape"]:
    """The log-probability of chosen tokens, finite for banned ones too.

    Agents that ignore action masks do choose banned tokens; these get their log-probability without the mask, which
    is finite, and as low as the model finds them.
    """
    scaled = logits.float() / temperature
    index = chosen[..., None]
    allowed = action_mask.expand(scaled.shape).gather(-1, index)
    masked = scaled.masked_fill(~action_mask, -torch.inf).logsumexp(-1, keepdim=True)
    return (scaled.gather(-1, index) - torch.where(allowed, masked, scaled.logsumexp(-1, keepdim=True)))[..., 0]
