"""Counts the tokens that a language model has read: a measure of compute that does not depend on the machine."""

from dataclasses import dataclass


@dataclass
class TokenPasses:
    """Token passes so far, padding included.

    Attributes:
        forward: tokens that a forward pass has read, one for each adapter that reads them.
        backward: those of them that were differentiated.
    """

    forward: int = 0
    backward: int = 0

    def add(self, tokens: int, differentiated: bool = False) -> None:
        """Counts a pass over so many tokens."""
        self.forward += tokens
        self.backward += tokens if differentiated else 0
