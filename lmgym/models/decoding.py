"""The interface of decoding: what `start` returns, `act` looks at and `advance` extends by one token."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    pass


@dataclass
class Decoding:
    """A batch of texts that have been read, and what the model says at the newest token of each.

    Attributes:
        hidden: [B, D] the trunk's last hidden state, from which the head and a value head read.
        critic: a second decoding over a value adapter, where the critic has one.
        nucleus: a second decoding over the adapter whose most probable tokens may be sampled, where that is another.
    """

    hidden: Float[Tensor, "B D"]
    critic: "Decoding | None" = field(default=None, kw_only=True)
    nucleus: "Decoding | None" = field(default=None, kw_only=True)

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token."""
        raise NotImplementedError

    def masked_logits(self, temperature: float, allowed: Bool[Tensor, "*rows V"]) -> Float[Tensor, "B V"]:
        """Logits over the temperature in float32, to be written to; tokens that are not allowed have no chance."""
        return (self.logits.float() / temperature).masked_fill_(~allowed, -torch.inf)

    @property
    def parts(self) -> "list[Decoding]":
        """This decoding and those that go along with it."""
        return [part for part in (self, self.critic, self.nucleus) if part is not None]

    def advance(self, token: Int[Tensor, " B"]) -> "Decoding":
        """Reads one more token in each row, in place, in all parts."""
        for part in self.parts:
            part._advance(token)
        return self

    def park(self, live: Bool[Tensor, " B"]) -> None:
        """Sends the rows that are not live back to position 0: they wait, and must not run past the last position."""
        for part in self.parts:
            part._park(live)

    def select(self, rows: Int[Tensor, " R"]) -> "Decoding | None":
        """These rows, in this order, as often as they are named; None where the model's cache cannot do that."""
        chosen = self._select(rows)
        if chosen is None:
            return None
        for name in ("critic", "nucleus"):
            part = getattr(self, name)
            if part is not None:
                setattr(chosen, name, part.select(rows))
        return chosen

    def replace_rows(self, rows: Int[Tensor, " R"], fresh: "Decoding", keep: int | None = None) -> bool:
        """Restarts some rows from `fresh`, in place.

        Args:
            rows: which.
            fresh: as many rows.
            keep: positions that no row exceeds; a cache that lines rows up at the right forgets older ones.

        Returns:
            False, having changed nothing, where the model's cache cannot do that.
        """
        pairs = list(zip(self.parts, fresh.parts, strict=True))
        if not all(own._replaceable for own, _ in pairs):
            return False
        for own, other in pairs:
            own._replace_rows(rows, other, keep)
        return True

    _replaceable = True

    def _advance(self, token: Tensor) -> None:
        raise NotImplementedError

    def _park(self, live: Tensor) -> None:
        raise NotImplementedError

    def _select(self, rows: Tensor) -> "Decoding | None":
        raise NotImplementedError

    def _replace_rows(self, rows: Tensor, fresh: "Decoding", keep: int | None) -> None:
        raise NotImplementedError
