"""How an agent's actions are parsed."""

from typing import Any, NamedTuple

import numpy as np
import torch
from gymnasium.error import InvalidAction
from torch import Tensor

from lmgym.io import quoted


class TokenAction(NamedTuple):
    """An action with the log-probability with which it was chosen, for `kl="sampled"`.

    Attributes:
        token: an int, or [B].
        logp: log π(token | state) in nats, a float or [B].
    """

    token: Any
    logp: Any


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
