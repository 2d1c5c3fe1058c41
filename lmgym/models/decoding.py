"""The interface of decoding: `start` returns a `Decoding`, `act` reads it, and `advance` extends it by one token."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmgym.models.passes import TokenPasses


@dataclass
class Decoding:
    """The state of a model that has read a batch of texts, and its output at the newest token of each.

    Attributes:
        hidden: [B, D] the last hidden state, the input of the output head and of a value head.
        critic: a second decoding with the value adapter, if the critic has one.
        nucleus: a second decoding with the adapter that truncates the sampling distribution, if that is another one.
        passes: counts the tokens that are read from here on.
    """

    hidden: Float[Tensor, "B D"]
    critic: "Decoding | None" = field(default=None, kw_only=True)
    nucleus: "Decoding | None" = field(default=None, kw_only=True)
    passes: TokenPasses | None = field(default=None, kw_only=True, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Decoding":
        """A copy that reads other tokens from here on; the weights are shared."""
        twin = self.select(torch.arange(len(self.hidden), device=self.hidden.device))
        if twin is None:
            raise NotImplementedError(
                "the cache of this model cannot be copied: start() again from the texts so far, which gives the same"
            )
        memo[id(self)] = twin
        return twin

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """[B, V] for the next token."""
        raise NotImplementedError

    def masked_logits(self, temperature: float, allowed: Bool[Tensor, "*rows V"]) -> Float[Tensor, "B V"]:
        """Logits divided by the temperature, in float32, forbidden tokens masked. The caller may overwrite them."""
        return (self.logits.float() / temperature).masked_fill_(~allowed, -torch.inf)

    @property
    def parts(self) -> "list[Decoding]":
        """This decoding, and those of the critic and the nucleus if there are any."""
        return [part for part in (self, self.critic, self.nucleus) if part is not None]

    def advance(self, token: Int[Tensor, " B"]) -> "Decoding":
        """Reads one more token in each row, in place, in all parts."""
        for part in self.parts:
            part._advance(token)
            if part.passes is not None:
                part.passes.add(len(token))
        return self

    def rewind_ended(self, running: Bool[Tensor, " B"]) -> None:
        """Sets the rows that have ended back to position 0, so that they never exceed the model's last position.

        Their output means nothing until they are replaced.
        """
        for part in self.parts:
            part._rewind_ended(running)

    def select(self, rows: Int[Tensor, " R"]) -> "Decoding | None":
        """These rows, in this order; a row may occur several times. None if the model's cache does not support it."""
        chosen = self._select(rows)
        if chosen is None:
            return None
        chosen.passes = self.passes
        for name in ("critic", "nucleus"):
            part = getattr(self, name)
            if part is not None:
                setattr(chosen, name, part.select(rows))
        return chosen

    def replace_rows(self, rows: Int[Tensor, " R"], fresh: "Decoding", max_length: int | None = None) -> bool:
        """Replaces some rows by those of `fresh`, in place.

        Args:
            rows: the rows to replace.
            fresh: a decoding of R rows.
            max_length: a length that no row exceeds; a right-aligned cache drops older positions.

        Returns:
            False, without any change, if the model's cache does not support it.
        """
        if not self.replaceable:
            return False
        for own, other in zip(self.parts, fresh.parts, strict=True):
            own._replace_rows(rows, other, max_length)
        return True

    @property
    def replaceable(self) -> bool:
        """Whether `replace_rows` is supported."""
        return all(part._replaceable for part in self.parts)

    _replaceable = True

    def _advance(self, token: Tensor) -> None:
        raise NotImplementedError

    def _rewind_ended(self, running: Tensor) -> None:
        raise NotImplementedError

    def _select(self, rows: Tensor) -> "Decoding | None":
        raise NotImplementedError

    def _replace_rows(self, rows: Tensor, fresh: "Decoding", max_length: int | None) -> None:
        raise NotImplementedError
