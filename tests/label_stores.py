"""What tests of labels share."""

from lmgym.preferences import Rules

PLAIN = Rules(repeat_share=0.0, gold_share=0.0)
"""Every question once, and no hidden ones."""


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now
