"""Any task with plain text prompts, as a conversation: each prompt becomes the message of a user."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lmgym.tasks.base import Completion, Prompt, Split, Task
from lmgym.tasks.messages import Message
from lmgym.tasks.prompt_list import PromptList


class Conversational(Task):
    """Wraps a task, so that a chat model sees each text prompt as a user's message.

    The prompt's `text` and `data` stay, so the task's score functions see what they saw before. Prompts that are
    conversations already only get the instruction, if they have none.

    Args:
        task: the task.
        system: an instruction that comes first in every conversation; None leaves it to the chat template.
    """

    def __init__(self, task: Task, system: str | None = None):
        self.task = task
        self.system = system
        self.name, self.best, self.stop = task.name, task.best, task.stop
        self.missing_eos_score, self.budgets, self.has_gold = task.missing_eos_score, task.budgets, task.has_gold

    def sample(self, rng: np.random.Generator, split: Split = "train") -> Prompt:
        return self.wrap(self.task.sample(rng, split))

    def prompt_from(self, text: str) -> Prompt:
        return self.wrap(self.task.prompt_from(text))

    def wrap(self, prompt: Prompt) -> Prompt:
        """The prompt as a conversation; see `as_conversation`."""
        return as_conversation(prompt, self.system)

    def demonstrated(self) -> Task:
        return Conversational(self.task.demonstrated(), self.system)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return self.task.score(prompts, completions)

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return self.task.gold(prompts, completions)

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        return self.task.demonstrate(prompt, rng)


def as_conversation(prompt: Prompt, system: str | None = None) -> Prompt:
    """A prompt as a conversation; token ids stay as they are.

    Args:
        prompt: a text becomes the message of a user.
        system: an instruction that comes first, unless the conversation has one.
    """
    if prompt.token_ids:
        return prompt
    messages: Sequence[Message] = prompt.messages or ({"role": "user", "content": prompt.text},)
    if system is not None and messages[0]["role"] not in ("system", "developer"):
        messages = ({"role": "system", "content": system}, *messages)
    return replace(prompt, messages=messages)


def prompts_of(task: Task) -> list[Prompt] | None:
    """All prompts of a task as the model gets them; None for a task that makes up its own."""
    if isinstance(task, Conversational):
        inner = prompts_of(task.task)
        return None if inner is None else list(map(task.wrap, inner))
    return task.prompts if isinstance(task, PromptList) else None
