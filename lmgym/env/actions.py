"""Actions: which tokens are allowed, and how an agent's actions are parsed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.error import InvalidAction
from jaxtyping import Bool
from torch import Tensor

from lmgym.io import quoted
from lmgym.models import LanguageModel


class TokenAction(NamedTuple):
    """An action with the log-probability with which it was chosen, for `kl="sampled"`.

    Attributes:
        token: an int, or [B].
        logp: log π(token | state) in nats, a float or [B].
    """

    token: Any
    logp: Any


def make_action_mask_table(
    model: LanguageModel, max_new_tokens: int, min_new_tokens: int, banned_tokens: Sequence[int]
) -> Bool[Tensor, "T V"]:
    """The action mask of every step: True where a token is allowed.

    Raises:
        ValueError: a banned token is outside the vocabulary, or a step allows no token.
    """
    wrong = [token for token in banned_tokens if not 0 <= token < model.vocabulary]
    if wrong:
        raise ValueError(f"banned_tokens {wrong} are outside the vocabulary of {model.vocabulary}")
    table = torch.ones(max_new_tokens, model.vocabulary, dtype=torch.bool, device=model.device)
    table[:, list({*model.banned_ids, *banned_tokens})] = False
    table[:min_new_tokens, list(model.eos_ids)] = False
    if not bool(table.any(1).all()):
        raise ValueError("banned_tokens leave a step at which no token is allowed")
    return table


def parse_actions(actions: Any, rows: int, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The token ids [B] of an agent's actions, and their log-probabilities [B] if it gave a `TokenAction`.

    Raises:
        InvalidAction: wrong type or shape, a token outside the vocabulary, or a log-probability that is not finite.
    """
    logp = None
    if isinstance(actions, TokenAction):
        logp = _parse_numbers(actions.logp, "finite log-probabilities", device).float().reshape(-1)
        if logp.shape != (rows,):
            raise InvalidAction(f"expected {rows} log-probabilities, got {len(logp)}")
        if not bool(torch.isfinite(logp).all()):
            raise InvalidAction(f"expected finite log-probabilities, got {logp.tolist()}")
        actions = actions.token
    token = _parse_numbers(actions, f"{rows} integer token ids", device).reshape(-1)
    if token.shape != (rows,) or token.is_floating_point():
        raise InvalidAction(f"expected {rows} integer token ids, got {quoted(actions)}")
    token = token.long()
    wrong = token[(token < 0) | (token >= vocabulary)].tolist()
    if wrong:
        raise InvalidAction(f"token {wrong[0]} is outside the vocabulary: actions are ids from 0 to {vocabulary - 1}")
    return token, logp


def _parse_numbers(value: Any, expected: str, device: torch.device) -> Tensor:
    """Real numbers of any type as a tensor on the device."""
    try:
        array = value if isinstance(value, Tensor) else np.asarray(value)
        numeric = array.dtype not in (torch.bool,) if isinstance(array, Tensor) else array.dtype.kind in "iuf"
        tensor = torch.as_tensor(array if numeric else None).to(device)
        if not tensor.is_complex():
            return tensor
    except (TypeError, ValueError, RuntimeError, OverflowError):  # a ragged list, text, an object
        pass
    raise InvalidAction(f"expected {expected}, got {quoted(value)}")
