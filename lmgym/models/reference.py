"""The frozen reference policy that KL is measured from."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmgym.fused import chosen_log_probs_from_hidden
from lmgym.io import report_progress
from lmgym.models.decoding import Decoding
from lmgym.models.language_model import LanguageModel
from lmgym.models.sequences import Mask, Sequences
from lmgym.sampling import chosen_log_probs


@dataclass(frozen=True)
class Reference:
    """The frozen policy that KL is measured from: the base with adapters off, or with a frozen adapter.

    Attributes:
        lm: the model, shared with the policy.
        adapter: a frozen adapter; None for the base alone.
        temperature: that of the policy, because KL compares the distributions that are sampled from.
    """

    lm: LanguageModel
    adapter: str | None = None
    temperature: float = 1.0

    @torch.no_grad()
    def start(self, input_ids: Int[Tensor, "B P"], attention_mask: Mask) -> Decoding:
        return self.lm.start(input_ids, attention_mask, self.adapter)

    @torch.no_grad()
    def advance(self, decoding: Decoding, token: Int[Tensor, " B"]) -> Decoding:
        return decoding.advance(token)

    def logp(
        self, decoding: Decoding, token: Int[Tensor, " B"], action_mask: Bool[Tensor, "B V"]
    ) -> Float[Tensor, " B"]:
        """log π_ref of a possible next token, in nats."""
        return chosen_log_probs(decoding.logits, token, self.temperature, action_mask)

    @torch.no_grad()
    def evaluate(self, sequences: Sequences, max_logits: int = 2**25) -> Float[Tensor, "B T"]:
        """log π_ref of every chosen token in full-sequence passes, in nats, 0 where no token was chosen.

        Args:
            sequences: prompts and chosen tokens.
            max_logits: limits memory: the rows of one pass have at most this many logits.
        """
        vocabulary = sequences.action_mask.shape[1]
        found, done = torch.zeros(sequences.tokens.shape, device=sequences.tokens.device), 0
        for rows, steps in sequences.buckets(max_logits // vocabulary):
            found[rows, :steps] = self._evaluate(sequences[rows].first_steps(steps))
            done += len(rows)
            report_progress("reference", done, len(found), done * (sequences.prompt_ids.shape[1] + steps))
        return found.masked_fill_(~sequences.is_action, 0.0)

    def _evaluate(self, part: Sequences) -> Tensor:
        allowed = part.chosen_is_allowed() | ~part.is_action
        if self.lm.fused(self.adapter) is None or not bool(allowed.all()):
            logits, _ = self.lm.evaluate(part, self.adapter)
            return chosen_log_probs(logits, part.tokens, self.temperature, part.environment_mask())
        hidden, head = self.lm.hidden(part, self.adapter), self.lm.output_head(self.temperature)
        mask, bits = self.lm.token_mask(part.action_mask), part.mask_bits(sampling=False)
        return chosen_log_probs_from_hidden(hidden, part.tokens, head, mask, bits, entropies=False)[0]
