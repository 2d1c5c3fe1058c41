"""Language models as Gymnasium environments.

Importing it registers the environments and imports no torch; everything else is imported when it is first used.

The letters of every shape: B rows, P prompt tokens, T new tokens, L = P + T, V vocabulary, D hidden size, G group.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmgym.registry import register_all, register_task

if TYPE_CHECKING:
    from lmgym.env import TokenAction, TokenEnv, TokenVectorEnv
    from lmgym.models import LanguageModel, load
    from lmgym.policy import Policy
    from lmgym.reward import AdaptiveKL, FixedKL, RewardModel, Score
    from lmgym.rollout import RolloutBuffer, Stream, collect
    from lmgym.tasks.base import Completion, Prompt, Task

__version__ = "0.1.0.dev0"

_LAZY = {
    "TokenAction": "lmgym.env",
    "TokenEnv": "lmgym.env",
    "TokenVectorEnv": "lmgym.env",
    "LanguageModel": "lmgym.models",
    "load": "lmgym.models",
    "Policy": "lmgym.policy",
    "AdaptiveKL": "lmgym.reward",
    "FixedKL": "lmgym.reward",
    "Score": "lmgym.reward",
    "RewardModel": "lmgym.reward",
    "RolloutBuffer": "lmgym.rollout",
    "Stream": "lmgym.rollout",
    "collect": "lmgym.rollout",
    "Completion": "lmgym.tasks.base",
    "Prompt": "lmgym.tasks.base",
    "Task": "lmgym.tasks.base",
}

__all__ = [
    "AdaptiveKL",
    "Completion",
    "FixedKL",
    "LanguageModel",
    "Policy",
    "Prompt",
    "RewardModel",
    "RolloutBuffer",
    "Score",
    "Stream",
    "Task",
    "TokenAction",
    "TokenEnv",
    "TokenVectorEnv",
    "collect",
    "load",
    "register_task",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in ("exact", "tasks", "testing"):
        return import_module(f"lmgym.{name}")
    raise AttributeError(f"module 'lmgym' has no attribute {name!r}")


register_all()
