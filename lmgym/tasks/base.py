"""The interface of a task: prompts to continue, and a score for each continuation. Plain Python and NumPy, no torch.

A task of your own is a subclass with two methods, `sample` and `score`; see `examples/04_your_own_task.py`, and
put `lmgym.testing.check_task(YourTask())` into its test.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

Split = Literal["train", "test"]
FinishReason = Literal["running", "stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        text: what the language model sees.
        data: what scoring needs and the model does not see, such as the right answer.
    """

    text: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Completion:
    """What the policy wrote after a prompt.

    Attributes:
        text: the decoded tokens, without end-of-sequence token or stop string.
        finish_reason: "stop" at an end-of-sequence token or stop string, "length" at the token budget.
        tokens: how many tokens were chosen, the end-of-sequence token included.
    """

    text: str
    finish_reason: FinishReason = "stop"
    tokens: int = 0


ScoreFunction = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[float]]
"""Any callable that gives one finite number for each completion of a batch."""


class Task(ABC):
    """Prompts to continue, and how good a continuation is.

    Attributes:
        name: short and stable; it appears in logs.
        best: the best attainable `gold` score, where it is known; reports place a policy between its starting
            point and this.
        stop: strings that end a completion, besides the model's end-of-sequence token.
        missing_eos_score: the score of a completion that reaches the token budget, whatever its text; None scores the
            text. Ziegler et al. 2019, section 3.1.2 (https://arxiv.org/abs/1909.08593); the "EOS trick" of Huang et al.
            2024 (https://arxiv.org/abs/2403.17031).
        budgets: arguments of `TokenVectorEnv` that suit the task, such as max_new_tokens.
        has_gold: whether there is a gold score; reports leave it out if there is none.
    """

    name: str = "task"
    best: float | None = None
    stop: tuple[str, ...] = ()
    missing_eos_score: float | None = None
    budgets: Mapping[str, Any] = MappingProxyType({})
    has_gold: bool = True

    @abstractmethod
    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        """Draws a prompt. It depends on `rng` and `split` alone, and the two splits share no prompt text."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        """Gives each completion a finite number; higher is better. It is the learner's reward."""

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        """The score for evaluation only, where `score` is a learned stand-in for it. Equals `score` by default."""
        return self.score(prompts, completions)

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        """Writes a completion for supervised fine-tuning; it need not be a good one.

        Raises:
            NotImplementedError: the task has no demonstrations; pass texts of your own.
        """
        raise NotImplementedError(
            f"the task {self.name!r} writes no demonstrations: implement demonstrate(), give whole texts to fine-tune "
            "on (--prompts FILE.jsonl with a field 'text', and --opening-words), or leave fine-tuning out "
            "(--sft.examples 0)"
        )


def split_of(text: str, test_share: float = 0.2) -> Split:
    """Puts a prompt text on one side of the train/test line for good, by a hash that no seed changes."""
    # A half character has no bytes in UTF-8, and is refused where the text is tokenised, not here.
    return "test" if zlib.crc32(text.encode(errors="surrogatepass")) < test_share * 2**32 else "train"


def sample_in_split(draw: Callable[[], Prompt], split: Split, tries: int = 1000) -> Prompt:
    """Draws until a prompt falls on the wanted side of `split_of`.

    Raises:
        ValueError: none of `tries` draws did: too few different prompts.
    """
    for _ in range(tries):
        prompt = draw()
        if split_of(prompt.text) == split:
            return prompt
    raise ValueError(f"none of {tries} prompts fell into the {split!r} split: the task has too few different prompts")
