"""What a finished batch was worth: its rewards, scores and ends."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """What a whole finished batch was worth.

    Attributes:
        rewards: [B, T] per token; 0 where no token was chosen.
        reference_logp: [B, T] log π_ref of the chosen tokens, in nats.
        is_action: [B, T] True where a token was chosen, up to and including the last.
        score: [B] the composed score; 0 for rows that were cut off (`on_limit="truncate"`).
        breakdown: [B] per component of the score, unweighted.
        finish: [B] a `Finish` number.
        truncated: [B] True where the row was cut off and is to be bootstrapped.
    """

    rewards: Float[Tensor, "B T"]
    reference_logp: Float[Tensor, "B T"]
    is_action: Bool[Tensor, "B T"]
    score: Float[Tensor, " B"]
    breakdown: Mapping[str, Float[Tensor, " B"]]
    finish: Int[Tensor, " B"]
    truncated: Bool[Tensor, " B"]
