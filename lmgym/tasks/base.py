"""The interface of a task: prompts to continue, and a score for each completion. Plain Python and NumPy, no torch.

To write your own task, make a subclass with two methods, `sample` and `score`; see `examples/04_your_own_task.py`. Call
`lmgym.testing.check_task(YourTask())` in its test.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from lmgym.io import quoted
from lmgym.tasks.messages import Message, check_messages, transcript

Split = Literal["train", "test"]
FinishReason = Literal["running", "stop", "length"]


@dataclass(frozen=True)
class Prompt:
    """What the language model continues: a text, a conversation, or token ids.

    Attributes:
        text: the text that the language model continues. With `messages`, it is for people, for score functions and for
            the assignment to a split; by default it is their transcript ("user: Hello", line by line).
        data: information for scoring that the model does not see, such as the right answer.
        messages: the conversation that the model answers, as {"role", "content"}; the tokenizer's chat template renders
            it. The last message is the user's (or a tool's).
        token_ids: the prompt's token ids, used as they are. Environments decode them into `text`, if it is empty.
        place: where the prompt was read, such as "questions.jsonl, line 3", for error messages. Prompts that differ in
            it alone are equal.

    Raises:
        ValueError: the messages have the wrong form or order, or both messages and token ids are given, or there is
            nothing to continue.
    """

    text: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Message] = ()
    token_ids: Sequence[int] = ()
    place: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not len(self.messages) and not len(self.token_ids):
            return
        if len(self.token_ids):
            if len(self.messages):
                raise ValueError("a prompt has messages or token_ids, not both")
            object.__setattr__(self, "token_ids", _check_ids(self.token_ids))
            return
        object.__setattr__(self, "messages", check_messages(self.messages, last=("user", "tool")))
        if not self.text:
            object.__setattr__(self, "text", transcript(self.messages))

    def quoted(self) -> str:
        """The beginning of its text, and where it was read, for error messages."""
        return quoted(self.text) + (f" of {self.place}" if self.place else "")


@dataclass(frozen=True)
class Completion:
    """The policy's continuation of a prompt.

    Attributes:
        text: the decoded tokens, without end-of-sequence token or stop string.
        finish_reason: "stop" at an end-of-sequence token or stop string, "length" at the token budget.
        tokens: the number of sampled tokens, including the end-of-sequence token.
        token_ids: the sampled tokens, if they are known. Two completions of the same text are equal without them.
    """

    text: str
    finish_reason: FinishReason = "stop"
    tokens: int = 0
    token_ids: Sequence[int] = field(default=(), compare=False, repr=False)


def _check_ids(ids: Sequence[Any]) -> tuple[int, ...]:
    checked = tuple(ids)
    for index in checked:
        if isinstance(index, bool) or not isinstance(index, int | np.integer) or index < 0:
            raise ValueError(f"token_ids contain {index!r}: give integers of 0 or more, below the model's vocabulary")
    return tuple(map(int, checked))


ScoreFunction = Callable[[Sequence[Prompt], Sequence[Completion]], Sequence[float]]
"""A callable that returns one finite number for each completion of a batch."""


class Task(ABC):
    """Prompts to continue, and a score for each completion.

    Attributes:
        name: a short and stable name; it appears in logs.
        best: the best attainable `gold` score, if it is known; reports show a policy's progress from its initial score
            to this.
        stop: strings that end a completion, in addition to the model's end-of-sequence token.
        missing_eos_score: the score of a completion that reaches the token budget, whatever its text; None scores the
            text. Ziegler et al. 2019, section 3.1.2 (https://arxiv.org/abs/1909.08593); the "EOS trick" of Huang et al.
            2024 (https://arxiv.org/abs/2403.17031).
        budgets: arguments of `TokenVectorEnv` that suit the task, such as max_new_tokens.
        has_gold: whether the task has a gold score; if not, reports leave it out.
    """

    name: str = "task"
    best: float | None = None
    stop: tuple[str, ...] = ()
    missing_eos_score: float | None = None
    budgets: Mapping[str, Any] = MappingProxyType({})
    has_gold: bool = True

    @abstractmethod
    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        """Draws a prompt. It depends only on `rng` and `split`; the two splits must not share a prompt text."""

    @abstractmethod
    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        """Returns a finite number for each completion; higher is better. It is the learner's reward."""

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        """The score for evaluation only, if `score` is a learned approximation of it. By default it is `score`."""
        return self.score(prompts, completions)

    def prompt_from(self, text: str) -> Prompt:
        """A user's text as a prompt of the form that the task's own prompts have; by default, the text itself."""
        return Prompt(text)

    def demonstrated(self) -> "Task":
        """The task with those prompts alone that `demonstrate` can answer; by default, with all of its prompts."""
        return self

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        """Writes a completion for supervised fine-tuning; it may be a bad one.

        Raises:
            NotImplementedError: the task has no demonstrations; pass your own texts.
        """
        raise NotImplementedError(
            f"the task {self.name!r} has no demonstrations: implement demonstrate(), give whole texts to fine-tune on "
            "(--prompts FILE.jsonl with a field 'text', and --opening-words), or skip fine-tuning "
            "(--sft.examples 0)"
        )


def split_of(text: str, test_share: float = 0.2) -> Split:
    """Assigns a prompt text to a split by its hash, independently of any seed."""
    # UTF-8 cannot encode a lone surrogate. The tokenizer rejects such a text later, so this function does not.
    return "test" if zlib.crc32(text.encode(errors="surrogatepass")) < test_share * 2**32 else "train"


def sample_in_split(draw: Callable[[], Prompt], split: Split, tries: int = 1000) -> Prompt:
    """Draws prompts until one is in the given split by `split_of`.

    Raises:
        ValueError: none of `tries` draws is; the task has too few different prompts.
    """
    for _ in range(tries):
        prompt = draw()
        if split_of(prompt.text) == split:
            return prompt
    raise ValueError(f"none of {tries} prompts fell into the {split!r} split: the task has too few different prompts")
