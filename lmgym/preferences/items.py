"""What people are asked, and what they answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lmgym.io import quoted
from lmgym.preferences.comparisons import Comparison
from lmgym.tasks.base import Prompt
from lmgym.tasks.messages import Message

Purpose = Literal["ask", "gold", "calibration", "write"]
Choice = Literal["left", "right", "tie", "neither", "skip", "ranking", "text"]
"""What a person chooses on the page: positions are those that were shown."""
MOST_TEXTS, LONGEST = 4, 100_000
"""How many texts a person ranks at most, and how many characters a text or a prompt has at most."""


@dataclass(frozen=True)
class Item:
    """A question for people: which of some texts continues a prompt best, or a prompt to write a text for.

    Attributes:
        prompt: what the texts continue; with `messages`, their transcript by default.
        texts: two to four different texts; none where a person writes one.
        messages: the conversation that the texts answer.
        purpose: "ask" for a label; "gold" and "calibration" have a known answer, hidden or told afterwards; "write"
            asks for a text.
        best: the index of the text that is known to be best.
        explanation: why, which is shown after an answer in the calibration round.
        source: where the texts come from; labellers do not see it.
        model: digest of the model that wrote the texts; labellers do not see it.
        split: labels of "test" items are never trained on.
        id: the row in the store; 0 before it is added.

    Raises:
        ValueError: it cannot be shown or answered.
    """

    prompt: str
    texts: tuple[str, ...] = ()
    messages: Sequence[Message] = ()
    purpose: Purpose = "ask"
    best: int | None = None
    explanation: str = ""
    source: str = ""
    model: str = ""
    split: Literal["train", "test"] = "train"
    id: int = 0

    def __post_init__(self) -> None:
        if len(self.messages):
            prompt = Prompt(self.prompt, messages=self.messages)
            object.__setattr__(self, "prompt", prompt.text)
            object.__setattr__(self, "messages", prompt.messages)
        writes = self.purpose == "write"
        if writes != (not self.texts) or not (writes or 2 <= len(self.texts) <= MOST_TEXTS):
            raise ValueError(
                f"{len(self.texts)} texts for the purpose {self.purpose!r}: give 2 to {MOST_TEXTS} texts to compare, "
                "and none to write one"
            )
        for text in (self.prompt, *self.texts):
            if len(text) > LONGEST:
                raise ValueError(
                    f"a text of {len(text):,} characters is too long for people to compare: give at most {LONGEST:,}"
                )
        if not all(text.strip() for text in self.texts):
            raise ValueError("a text is empty, so there is nothing to compare: leave the row out")
        if len(set(self.texts)) < len(self.texts):
            raise ValueError(f"two texts are the same ({quoted(self.texts[0], 60)}): give different ones")
        if self.best is not None and not 0 <= self.best < len(self.texts):
            raise ValueError(f"best={self.best} is not the index of one of {len(self.texts)} texts")
        if self.purpose in ("gold", "calibration") and self.best is None:
            raise ValueError(f"an item for {self.purpose} needs the index of its best text")

    @classmethod
    def of(cls, comparison: Comparison, purpose: Purpose = "ask", source: str = "", model: str = "") -> "Item":
        """The question that a comparison answers; its order is kept, and is known where the purpose needs it."""
        best = 0 if purpose in ("gold", "calibration") else None
        texts, messages = comparison.ranked, comparison.messages
        return cls(comparison.prompt, texts, messages, purpose, best, source=source, model=model)


@dataclass(frozen=True)
class Showing:
    """An item as one labeller sees it.

    Attributes:
        nonce: names this showing; a second answer with it changes nothing.
        item: what is shown.
        side: the indices of the item's texts, from left to right.
        repeat: whether the labeller has answered this item before, with the sides reversed.
    """

    nonce: str
    item: Item
    side: tuple[int, ...]
    repeat: bool


@dataclass(frozen=True)
class Label:
    """An answer that counts.

    Attributes:
        id: of the event; later ones are larger.
        item: the id of the item.
        labeller: a pseudonym.
        answer: "a" or "b" for the item's first or second text, "tie", "neither", "skip", "ranking" or "text".
        ranking: the indices of the texts, best first; empty unless there is an order.
        text: what a person wrote.
        strength: 1 (slightly better) to 4 (much better), where it was asked.
        side: the indices of the texts, from left to right.
        repeat: whether it answers the same question a second time, to measure consistency; it is never trained on.
        shown_at, answered_at: seconds since 1970 by the server's clock; None where it is unknown.
        client_ms: milliseconds that the page was shown, by the browser's clock.
        guideline: version of the guidelines that were shown; 0: none.
        model: digest of the model that wrote the texts.
    """

    id: int
    item: int
    labeller: str
    answer: str
    ranking: tuple[int, ...] = ()
    text: str = ""
    strength: int | None = None
    side: tuple[int, ...] = ()
    repeat: bool = False
    shown_at: float | None = None
    answered_at: float = 0.0
    client_ms: float | None = None
    guideline: int = 0
    model: str = ""


def answer_of(choice: str, side: Sequence[int], ranking: Sequence[int] = ()) -> tuple[str, tuple[int, ...]]:
    """An answer and its order of the item's texts, from what was chosen on the page.

    Args:
        choice: a `Choice`.
        side: the indices of the item's texts, from left to right.
        ranking: for "ranking", the positions on the page, best first.

    Raises:
        ValueError: the choice does not fit the item.
    """
    count = len(side)
    if choice in ("left", "right") and count == 2:
        best = side[choice == "right"]
        return "ab"[best], (best, 1 - best)
    if choice == "ranking" and count > 2 and sorted(ranking) == list(range(count)):
        return "ranking", tuple(side[position] for position in ranking)
    if choice == "skip" or (choice in ("tie", "neither") and count) or (choice == "text" and not count):
        return choice, ()
    raise ValueError(f"the choice {quoted(choice, 40)} with the ranking {quoted(list(ranking), 40)} of {count} texts")
