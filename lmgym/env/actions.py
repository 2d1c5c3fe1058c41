"""Actions: a token id, or a token id with the log-probability with which it was sampled."""

from typing import Any, NamedTuple


class TokenAction(NamedTuple):
    """An action with the log-probability with which it was chosen, for `kl="sampled"`.

    Attributes:
        token: an int, or [B].
        logp: log π(token | state) in nats, a float or [B].
    """

    token: Any
    logp: Any
