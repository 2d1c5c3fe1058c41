"""Prompts with the tokens chosen after them, and how rows are put together for a pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from lmgym.fused import FrozenPrefix
from lmgym.sampling import unpack_bits

Mask = Bool[Tensor, "B P"] | Int[Tensor, "B P"]


@dataclass(frozen=True)
class Sequences:
    """Prompts and the tokens chosen after them.

    Attributes:
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] True on the prompt's tokens.
        tokens: [B, T] chosen tokens, pad behind the end.
        is_action: [B, T] True where a token was chosen.
        action_mask: [T, V] True where the environment allowed a token at that step.
        sampling_mask: [B, T, W] the tokens that truncated sampling (top-k, top-p) kept, as bits; None where all were.
        frozen_prefix: what the layers below the adapters made of them, where that was kept.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    tokens: Int[Tensor, "B T"]
    is_action: Bool[Tensor, "B T"]
    action_mask: Bool[Tensor, "T V"]
    sampling_mask: UInt8[Tensor, "B T W"] | None = None
    frozen_prefix: FrozenPrefix | None = None

    def __getitem__(self, rows: Any) -> "Sequences":
        sampling_mask = None if self.sampling_mask is None else self.sampling_mask[rows]
        frozen_prefix = (
            None if self.frozen_prefix is None else self.frozen_prefix._replace(hidden=self.frozen_prefix.hidden[rows])
        )
        parts = (self.prompt_ids[rows], self.prompt_mask[rows], self.tokens[rows], self.is_action[rows])
        return Sequences(*parts, self.action_mask, sampling_mask, frozen_prefix)

    def buckets(self, most_tokens: int = 0, by_length: bool = True) -> "list[tuple[Int[Tensor, ' R'], int]]":
        """Rows that are worth a pass of their own, and how many steps the longest of them takes; see `buckets`."""
        width = self.prompt_ids.shape[1]
        lengths = self.is_action.sum(1).tolist() if by_length else [self.tokens.shape[1]] * len(self.tokens)
        most_tokens = most_tokens or default_pass_tokens(self.tokens.device)
        return [
            (torch.tensor(rows, device=self.tokens.device), steps)
            for rows, steps in buckets(lengths, width, most_tokens)
        ]

    def first_steps(self, steps: int) -> "Sequences":
        """Without the steps that follow the first `steps`."""
        sampling_mask = None if self.sampling_mask is None else self.sampling_mask[:, :steps]
        parts = (self.tokens[:, :steps], self.is_action[:, :steps], self.action_mask[:steps])
        return Sequences(self.prompt_ids, self.prompt_mask, *parts, sampling_mask, self.frozen_prefix)

    def behaviour_mask(self) -> Bool[Tensor, "*rows T V"]:
        """[T, V] or [B, T, V] True where the policy that acted could have chosen a token."""
        if self.sampling_mask is None:
            return self.action_mask
        return self.action_mask & unpack_bits(self.sampling_mask, self.action_mask.shape[1])


def default_pass_tokens(device: torch.device) -> int:
    """Tokens that a pass takes at a time: on a CPU as many as the caches hold, on a GPU enough to fill it."""
    return 4096 if device.type == "cpu" else 65536


def buckets(lengths: Sequence[int], width: int, most_tokens: int) -> list[tuple[list[int], int]]:
    """Rows of similar length together, so that little of a pass is padding.

    Args:
        lengths: how many steps each row takes.
        width: what each row holds beside these, such as its prompt.
        most_tokens: that a bucket may hold, padding included; a single row may hold more.

    Returns:
        Rows, and the length of the longest of them, for each bucket; a row stands in one.
    """
    found: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if found:
            rows, longest = found[-1]
            full = (len(rows) + 1) * (width + longest) > most_tokens
            # Padding of a fifth costs more than the overhead of another pass over rows that fill one.
            shorter = (width + lengths[row]) < 0.8 * (width + longest) and len(rows) * (width + longest) > 512
            if not full and not shorter:
                rows.append(row)
                continue
        found.append(([row], max(1, lengths[row])))
    return found
