"""The rollout buffer: one rollout, preallocated on the policy's device and written in place."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from lmgym.env import TokenVectorEnv
from lmgym.fused import FrozenPrefix
from lmgym.models import Sequences


class RolloutBuffer:
    """One rollout of B rows by T steps, preallocated on the policy's device and written in place.

    Attributes:
        prompt_ids: [B, P] left-padded.
        prompt_mask: [B, P] True on the prompt's tokens.
        tokens: [B, T] the actions.
        is_action: [B, T] True where an action was taken, up to and including the last.
        logp: [B, T] log π(action) when it was taken, in nats.
        values: [B, T] the critic's estimate when it was taken.
        reference_logp: [B, T] log π_ref(action) in nats.
        rewards: [B, T].
        bootstrap: [B] the critic's estimate at the end of rows that were truncated, else 0.
        score: [B] the composed score.
        beta: β with which KL was paid, in score per nat.
        breakdown: [B] per component of the score, unweighted.
        finish: [B] why the row ended, a `lmgym.env.Finish` number.
        action_mask: [T, V] True where a token was allowed.
        sampling_mask: [B, T, W] the tokens that truncated sampling kept, as bits; None if the policy does not truncate.
        text_mask: [B, T, W] the tokens that were allowed, as bits, if that depends on the text; None otherwise.
        prompt_width: the number of tokens of the longest prompt of this rollout.
        frozen_prefix: the activations below the policy's adapter; None if it adapts all layers.
        loop: the `CapturedLoop` that fills the buffer, if decoding steps are captured in a CUDA graph.
        own_rows: the `OwnRows` of this rank, if there are several.
    """

    sampling_mask: UInt8[Tensor, "B T W"] | None = None
    text_mask: UInt8[Tensor, "B T W"] | None = None
    frozen_prefix: FrozenPrefix | None = None
    loop: Any = None
    own_rows: Any = None

    def __init__(self, rows: int, prompt_tokens: int, new_tokens: int, action_mask: Tensor):
        device = action_mask.device

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.prompt_ids = empty(rows, prompt_tokens, dtype=torch.long)
        self.prompt_mask = empty(rows, prompt_tokens, dtype=torch.bool)
        self.tokens = empty(rows, new_tokens, dtype=torch.long)
        self.is_action = empty(rows, new_tokens, dtype=torch.bool)
        self.logp = empty(rows, new_tokens)
        self.values = empty(rows, new_tokens)
        self.reference_logp = empty(rows, new_tokens)
        self.rewards = empty(rows, new_tokens)
        self.bootstrap = empty(rows)
        self.score = empty(rows)
        self.breakdown: Mapping[str, Tensor] = {}
        self.finish = empty(rows, dtype=torch.int8)
        self.beta = 0.0
        self.action_mask = action_mask
        self.prompt_width = prompt_tokens

    @classmethod
    def like(cls, env: TokenVectorEnv) -> "RolloutBuffer":
        """A buffer for an environment's rows and budgets."""
        return cls(env.num_envs, env.max_prompt_tokens, env.max_new_tokens, env.action_mask_table)

    def part(self, rows: slice, before: "RolloutBuffer") -> "RolloutBuffer":
        """These rows in the same memory; `before` is an earlier part of them, which is brought up to date."""
        shared = {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and name != "action_mask"}
        before.__dict__.update({name: x[rows] for name, x in shared.items()}, frozen_prefix=None, breakdown={})
        return before

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def columns(self) -> int:
        """P + T, tokens of a row of this rollout, padding included."""
        return self.prompt_width + self.tokens.shape[1]

    @property
    def sequences(self) -> Sequences:
        """Prompts and actions, without the columns that pad every prompt."""
        prompt_ids, prompt_mask = (x[:, -self.prompt_width :] for x in (self.prompt_ids, self.prompt_mask))
        return Sequences(
            prompt_ids,
            prompt_mask,
            self.tokens,
            self.is_action,
            self.action_mask,
            self.sampling_mask,
            self.frozen_prefix,
            self.text_mask,
        )

    def at_last(self, x: Float[Tensor, " B"]) -> Float[Tensor, "B T"]:
        """`x` of each row at the row's last action, where the score is paid, and 0 elsewhere."""
        last = self.is_action.sum(1, keepdim=True) - 1
        return torch.zeros_like(self.rewards).scatter_(1, last, x[:, None])

    def clear(self, mask_bytes: int = 0) -> None:
        """Clears the buffer for the next rollout.

        Args:
            mask_bytes: W, the bytes of `sampling_mask` for each token; 0 for a policy that does not truncate.
        """
        for tensor in (self.prompt_mask, self.is_action, self.logp, self.values, self.bootstrap):
            tensor.zero_()
        self.frozen_prefix = None
        if not mask_bytes:
            self.sampling_mask = None
        elif self.sampling_mask is None:
            self.sampling_mask = torch.empty(
                *self.tokens.shape, mask_bytes, dtype=torch.uint8, device=self.tokens.device
            )
        if self.sampling_mask is not None:
            # Steps that are not taken keep every token, so that their log-probabilities are finite.
            self.sampling_mask.fill_(255)
