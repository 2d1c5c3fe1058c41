"""The log-probabilities of an environment's actions under a model, from a KV cache that follows the rows."""

import copy
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lmgym.env.row_state import RowState
from lmgym.models import Decoding


@runtime_checkable
class TokenScorer(Protocol):
    """Gives the log-probability of the next token: the reference, or a policy bound to the environment."""

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> Decoding: ...
    def advance(self, decoding: Decoding, token: Tensor) -> Decoding: ...
    def logp(self, decoding: Decoding, token: Tensor, action_mask: Tensor) -> Tensor: ...


class ScorerCache:
    """Keeps a scorer's KV cache in step with the rows of an environment, also when single rows are reset.

    Prompts are read only when a log-probability is needed, so that the bulk path does not pay for them.

    Attributes:
        decoding: the cache; None where it has to be built from the texts so far.
        stale: [B] True for rows with a new prompt, which the cache has not read yet.
    """

    def __init__(self, scorer: TokenScorer, state: RowState):
        self.scorer = scorer
        self.state = state
        self.decoding: Decoding | None = None
        self.stale = torch.ones(state.rows, dtype=torch.bool, device=state.length.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ScorerCache":
        # The scorer is a handle. A cache that cannot be copied is built anew from the texts so far.
        memo[id(self)] = twin = ScorerCache(self.scorer, copy.deepcopy(self.state, memo))
        everyone = torch.arange(self.state.rows, device=self.stale.device)
        twin.decoding = None if self.decoding is None else self.decoding.select(everyone)
        twin.stale = self.stale.clone()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"decoding": None}

    def logp(self, token: Tensor, action_mask: Tensor) -> Tensor:
        """[B] log-probability of the next token of each row, in nats."""
        return self.scorer.logp(self._current(), token, action_mask)

    def advance(self, token: Tensor, live: Tensor) -> None:
        """Reads a token in each row; `live` [B] is False for rows that had ended before."""
        decoding = self._current()
        # Ended rows wait for their reset; their position must not pass the model's last one.
        decoding.rewind_ended(live)
        self.decoding = self.scorer.advance(decoding, token)

    def _current(self) -> Decoding:
        state = self.state
        if self.decoding is not None and not bool(self.stale.any()):
            return self.decoding
        rows = self.stale.nonzero()[:, 0]
        self.stale[:] = False
        if self.decoding is not None and len(rows) < state.rows:
            fresh = self.scorer.start(state.prompt_ids[rows], state.prompt_mask[rows])
            if self.decoding.replace_rows(rows, fresh, state.max_prompt_tokens + state.max_new_tokens):
                return self.decoding
        if bool((state.length == 0).all()):
            self.decoding = self.scorer.start(state.prompt_ids, state.prompt_mask)
        else:
            observation = state.observation()
            self.decoding = self.scorer.start(observation["input_ids"], observation["attention_mask"])
        return self.decoding
