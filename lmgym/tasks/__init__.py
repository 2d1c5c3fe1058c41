"""Tasks: prompts to continue, and a score for each completion. This package does not import torch."""

from lmgym.tasks.arithmetic import Arithmetic
from lmgym.tasks.base import Completion, FinishReason, Prompt, ScoreFunction, Split, Task, sample_in_split, split_of
from lmgym.tasks.conversational import Conversational, as_conversation, prompts_of
from lmgym.tasks.messages import Message, check_messages, transcript
from lmgym.tasks.probe import Bandit, Tree
from lmgym.tasks.prompt_list import PromptList
from lmgym.tasks.reverse import Reverse
from lmgym.tasks.rule import RuleTask
from lmgym.tasks.sentiment import Sentiment
from lmgym.tasks.sort import Sort

__all__ = [
    "Arithmetic",
    "Bandit",
    "Completion",
    "Conversational",
    "FinishReason",
    "Message",
    "Prompt",
    "PromptList",
    "Reverse",
    "RuleTask",
    "ScoreFunction",
    "Sentiment",
    "Sort",
    "Split",
    "Task",
    "Tree",
    "as_conversation",
    "check_messages",
    "prompts_of",
    "sample_in_split",
    "split_of",
    "transcript",
]
