"""Prompts with the tokens chosen after them, and the grouping of rows into passes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from lmgym.devices import host_reads_are_free
from lmgym.fused import FrozenPrefix
from lmgym.sampling import unpack_bits

Mask = Bool[Tensor, "B P"] | Int[Tensor, "B P"]


@dataclass(frozen=True)
class Sequences:
    """Prompts and the tokens chosen after them.

    Attributes:
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] True on the prompt's tokens.
        tokens: [B, T] chosen tokens, padded after the end.
        is_action: [B, T] True where a token was chosen.
        action_mask: [T, V] True where the environment allowed a token at that step.
        sampling_mask: [B, T, W] the tokens that truncated sampling (top-k, top-p) kept, as bits; None if not truncated.
        frozen_prefix: the stored output of the layers below the adapters for these sequences, or None.
        text_mask: [B, T, W] the tokens that the environment allowed, as bits, where that depends on the text; None if
            `action_mask` says all.
    """

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    tokens: Int[Tensor, "B T"]
    is_action: Bool[Tensor, "B T"]
    action_mask: Bool[Tensor, "T V"]
    sampling_mask: UInt8[Tensor, "B T W"] | None = None
    frozen_prefix: FrozenPrefix | None = None
    text_mask: UInt8[Tensor, "B T W"] | None = None

    def __getitem__(self, rows: Any) -> "Sequences":
        sampling_mask = None if self.sampling_mask is None else self.sampling_mask[rows]
        frozen_prefix = (
            None if self.frozen_prefix is None else self.frozen_prefix._replace(hidden=self.frozen_prefix.hidden[rows])
        )
        text_mask = None if self.text_mask is None else self.text_mask[rows]
        parts = (self.prompt_ids[rows], self.prompt_mask[rows], self.tokens[rows], self.is_action[rows])
        return Sequences(*parts, self.action_mask, sampling_mask, frozen_prefix, text_mask)

    def buckets(self, max_tokens: int = 0, by_length: bool = True) -> "list[tuple[Int[Tensor, ' R'], int]]":
        """The rows of each pass, and the number of steps of the longest of them; see the function `buckets`.

        Args:
            max_tokens: that a pass may hold; 0 takes the default of the device.
            by_length: whether to group rows of similar length; otherwise all rows count as T steps long.
        """
        width = self.prompt_ids.shape[1]
        lengths = self.is_action.sum(1).tolist() if by_length else [self.tokens.shape[1]] * len(self.tokens)
        max_tokens = max_tokens or default_pass_tokens(self.tokens.device)
        return [
            (torch.tensor(rows, device=self.tokens.device), steps)
            for rows, steps in buckets(lengths, width, max_tokens)
        ]

    def first_steps(self, steps: int) -> "Sequences":
        """The first `steps` steps alone."""
        sampling_mask, text_mask = (m if m is None else m[:, :steps] for m in (self.sampling_mask, self.text_mask))
        parts = (self.tokens[:, :steps], self.is_action[:, :steps], self.action_mask[:steps])
        return Sequences(self.prompt_ids, self.prompt_mask, *parts, sampling_mask, self.frozen_prefix, text_mask)

    # Masks ---------------------------------------------------------------------------------------------------------

    def environment_mask(self) -> Bool[Tensor, "*rows T V"]:
        """[T, V] or [B, T, V] True where the environment allowed a token: the mask of the reference."""
        return self._with_bits(self.mask_bits(sampling=False))

    def left_aligned(self) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B T"] | slice]:
        """Whole texts without their last token, left-aligned, and the positions from which each token was chosen."""
        steps = self.tokens.shape[1]
        ids, length, longest, equal = left_align(self.prompt_ids, self.prompt_mask)
        whole = torch.cat([self.prompt_ids, self.tokens[:, :-1]], 1)
        width = self.prompt_ids.shape[1]
        if equal:
            return whole[:, width - longest :], slice(longest - 1, longest - 1 + steps)
        column = torch.arange(longest + steps - 1, device=ids.device) + (width - length)[:, None]
        whole = whole.gather(1, column.clamp(max=whole.shape[1] - 1))
        return whole, (length - 1)[:, None] + torch.arange(steps, device=ids.device)

    def behaviour_mask(self) -> Bool[Tensor, "*rows T V"]:
        """[T, V] or [B, T, V] True where the acting policy could have chosen a token."""
        return self._with_bits(self.mask_bits(sampling=True))

    def mask_bits(self, sampling: bool) -> UInt8[Tensor, "B T W"] | None:
        """What the rows' own masks allow beside the table `action_mask`, as bits; None if that says all.

        Args:
            sampling: whether to include what truncated sampling kept.
        """
        if not sampling or self.sampling_mask is None:
            return self.text_mask
        return self.sampling_mask if self.text_mask is None else self.sampling_mask & self.text_mask

    def _with_bits(self, bits: Tensor | None) -> Tensor:
        return self.action_mask if bits is None else self.action_mask & unpack_bits(bits, self.action_mask.shape[1])

    def chosen_is_allowed(self) -> Bool[Tensor, "B T"]:
        """True where the environment allowed the chosen token; without an action it may be either."""
        steps = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        allowed = self.action_mask[steps, self.tokens]
        if self.text_mask is None:
            return allowed
        bits = self.text_mask.gather(2, (self.tokens // 8)[..., None])[..., 0] >> (self.tokens % 8)
        return allowed & (bits % 2 == 1)


def left_align(ids: Int[Tensor, "B P"], mask: Mask) -> tuple[Int[Tensor, "B L"], Int[Tensor, " B"], int, bool]:
    """Moves left-padded texts to the left edge.

    On a CPU the lengths are read; elsewhere that would synchronise with the device.

    Returns:
        ids: [B, L] the texts, left-aligned; L is P, or their length where all are known to be equal.
        length: [B] their lengths.
        longest: the largest length, or P where lengths are not read.
        equal: whether all lengths are known to be equal.
    """
    width, length = ids.shape[1], mask.sum(1)
    longest, equal = width, False
    if host_reads_are_free(ids.device):
        longest = int(length.max())
        equal = longest == int(length.min())
    if equal:
        return ids[:, width - longest :].long(), length, longest, True
    column = torch.arange(width, device=ids.device) + (width - length)[:, None]
    return ids.gather(1, column.clamp(max=width - 1)).long(), length, longest, False


def default_pass_tokens(device: torch.device) -> int:
    """The default number of tokens per pass: on a CPU few enough for its caches, on a GPU enough to use all of it."""
    return 4096 if device.type == "cpu" else 65536


def buckets(lengths: Sequence[int], width: int, max_tokens: int) -> list[tuple[list[int], int]]:
    """Groups rows of similar length, so that a pass contains little padding.

    Args:
        lengths: the number of steps of each row.
        width: the number of other tokens of each row, such as its prompt.
        max_tokens: that a bucket may hold, padding included; a single row may hold more.

    Returns:
        For each bucket its rows, and the length of the longest of them. Every row is in exactly one bucket.
    """
    found: list[tuple[list[int], int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if found:
            rows, longest = found[-1]
            full = (len(rows) + 1) * (width + longest) > max_tokens
            # A new pass has an overhead, which is smaller than the cost of one fifth of padding in a large pass.
            shorter = (width + lengths[row]) < 0.8 * (width + longest) and len(rows) * (width + longest) > 512
            if not full and not shorter:
                rows.append(row)
                continue
        found.append(([row], max(1, lengths[row])))
    return found
