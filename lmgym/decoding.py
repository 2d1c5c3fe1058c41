"""Where decoding stands: what `start` returns, `act` looks at and `advance` moves on."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmgym.head import Room, lowest
from lmgym.trunk import Cache, Layer, Trunk, tensors_of

if TYPE_CHECKING:
    from lmgym.models import LanguageModel


class Bottom(NamedTuple):
    """What the layers below the adapters make of texts, computed once for all passes above it.

    It belongs to these texts: sequences with other tokens need another one, or None.

    Attributes:
        hidden: [B, L, D] what goes into layer `layer`; column c holds position c.
        layer: the lowest layer that an adapter changes.
        owner: whose layers these are; others compute their own.
    """

    hidden: Float[Tensor, "B L D"]
    layer: int
    owner: Trunk


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


@dataclass
class FusedDecoding(Decoding):
    """Decoding by `lmgym.trunk`, with adapters merged into a copy of the weights.

    Attributes:
        lm: gives the head.
        trunk: the functions.
        layers: the merged weights.
        cache: keys and values.
        keep: the layer whose input the cache keeps, where it keeps one.
        room: memory for the logits of every step.
    """

    lm: "LanguageModel"
    trunk: Trunk
    layers: list[Layer]
    cache: Cache
    keep: int = 0
    room: Room = field(default_factory=Room, repr=False)

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token, computed when asked for."""
        return self.lm.head(self.hidden)

    @property
    def bottom(self) -> Bottom | None:
        """What the layers below the adapter made of the texts so far, where it is kept."""
        kept = self.cache.bottom
        return None if kept is None else Bottom(kept[:, : self.cache.longest], self.keep, self.trunk)

    def masked_logits(self, temperature: float, allowed: Bool[Tensor, "*rows V"]) -> Float[Tensor, "B V"]:
        """As above; a mask that all rows share goes in with the projection."""
        head, low = self.lm.output_head(temperature), lowest(self.hidden.dtype)
        if allowed.ndim > 1:
            return head.logits(self.hidden, room=self.room).masked_fill_(~allowed, low)
        added = self.hidden.new_zeros(allowed.shape).masked_fill_(~allowed, low)
        return head.logits(self.hidden, added, self.room)

    def still(self, rows: int, columns: int) -> "FusedDecoding":
        """A decoding of another size, over the same weights, in which nothing ever moves; see `fill`."""
        hidden = self.hidden.new_zeros(rows, self.hidden.shape[1])
        return FusedDecoding(hidden, self.lm, self.trunk, self.layers, self.cache.still(rows, columns), self.keep)

    def fill(self, other: "FusedDecoding", rows: Int[Tensor, " R"]) -> None:
        """Takes over rows of another decoding and its weights, in place."""
        self.hidden.copy_(other.hidden[rows])
        self.cache.fill(other.cache, rows)
        for own, new in zip(tensors_of(self.layers), tensors_of(other.layers), strict=True):
            if own.data_ptr() != new.data_ptr():
                own.copy_(new)

    @torch.no_grad()
    def _advance(self, token: Tensor) -> None:
        if self.cache.fixed:
            self.hidden.copy_(self.trunk.step(self.layers, token, self.cache, self.keep))
            return
        if self.cache.longest == self.cache.capacity:
            self.cache = self.cache.reserve(self.cache.capacity * 3 // 2 + 1)
        self.hidden = self.trunk.step(self.layers, token, self.cache, self.keep)

    def _park(self, live: Tensor) -> None:
        self.cache.loosen()
        self.cache.length = self.cache.length * live

    def _select(self, rows: Tensor) -> "FusedDecoding":
        kept = self.cache.select(rows)
        return FusedDecoding(self.hidden[rows], self.lm, self.trunk, self.layers, kept, self.keep)

    def _replace_rows(self, rows: Tensor, fresh: Decoding, keep: int | None) -> None:
        assert isinstance(fresh, FusedDecoding)
        self.cache = self.cache.put(rows, fresh.cache)
        if keep is not None:  # rows that were parked have moved `longest` on for nothing
            self.cache.longest = min(self.cache.longest, max(keep, fresh.cache.longest))
        self.hidden = self.hidden.index_copy(0, rows, fresh.hidden)
