"""Any task with plain text prompts, as a conversation: each prompt becomes the message of a user."""

from collections.abc import Sequence

import numpy as np

from lmgym.tasks.base import Completion, Prompt, Split, Task
from lmgym.tasks.messages import Message


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

    def wrap(self, prompt: Prompt) -> Prompt:
        """The prompt as a conversation; token ids stay as they are."""
        if prompt.token_ids:
            return prompt
        messages: Sequence[Message] = prompt.messages or ({"role": "user", "content": prompt.text},)
        if self.system is not None and messages[0]["role"] not in ("system", "developer"):
            messages = ({"role": "system", "content": self.system}, *messages)
        return Prompt(prompt.text, prompt.data, messages)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return self.task.score(prompts, completions)

    def gold(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Sequence[float]:
        return self.task.gold(prompts, completions)

    def demonstrate(self, prompt: Prompt, rng: np.random.Generator) -> str:
        return self.task.demonstrate(prompt, rng)
