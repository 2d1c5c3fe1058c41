"""The log-probabilities of an environment's actions under a model, from a cache that follows the rows."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lmgym.models import Decoding


@runtime_checkable
class TokenScorer(Protocol):
    """Whatever gives the log-probability of the next token: the reference, or a policy bound to the environment."""

    def start(self, input_ids: Tensor, attention_mask: Tensor) -> Decoding: ...
    def advance(self, decoding: Decoding, token: Tensor) -> Decoding: ...
    def logp(self, decoding: Decoding, token: Tensor, action_mask: Tensor) -> Tensor: ...


@runtime_checkable
class PromptedRows(Protocol):
    """The part of `TokenVectorEnv` that a scorer's cache reads."""

    num_envs: int
    max_prompt_tokens: int
    max_new_tokens: int
    prompt_ids: Tensor
    prompt_mask: Tensor
    length: Tensor

    def observation(self) -> dict[str, Tensor]: ...


class ScorerCache:
    """Follows the rows of an environment with a scorer's cache, through resets of single rows.

    It reads prompts only when it is asked about the next token, so that the bulk path never pays for it.
    """

    def __init__(self, scorer: TokenScorer, env: PromptedRows):
        self.scorer = scorer
        self.env = env
        self.decoding: Decoding | None = None
        self.stale = torch.ones(env.num_envs, dtype=torch.bool, device=env.length.device)

    def logp(self, token: Tensor, action_mask: Tensor) -> Tensor:
        return self.scorer.logp(self._current(), token, action_mask)

    def advance(self, token: Tensor, live: Tensor) -> None:
        decoding = self._current()
        # Ended rows wait for their reset; their position must not run past the model's last one.
        decoding.rewind_ended(live)
        self.decoding = self.scorer.advance(decoding, token)

    def _current(self) -> Decoding:
        env = self.env
        if self.decoding is not None and not bool(self.stale.any()):
            return self.decoding
        rows = self.stale.nonzero()[:, 0]
        self.stale[:] = False
        if self.decoding is not None and len(rows) < env.num_envs:
            fresh = self.scorer.start(env.prompt_ids[rows], env.prompt_mask[rows])
            if self.decoding.replace_rows(rows, fresh, env.max_prompt_tokens + env.max_new_tokens):
                return self.decoding
        if bool((env.length == 0).all()):
            self.decoding = self.scorer.start(env.prompt_ids, env.prompt_mask)
        else:
            state = env.observation()
            self.decoding = self.scorer.start(state["input_ids"], state["attention_mask"])
        return self.decoding
