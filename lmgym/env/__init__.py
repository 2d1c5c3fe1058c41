"""Token generation as a Gymnasium environment: `TokenVectorEnv`, batched in torch, and `TokenEnv`, its one-row view."""

from lmgym.env.action_masks import ActionMaskFunction
from lmgym.env.actions import TokenAction
from lmgym.env.arguments import OnLimit
from lmgym.env.batch_outcome import Outcome
from lmgym.env.part import part_of
from lmgym.env.row_state import Finish
from lmgym.env.scalar import TokenEnv
from lmgym.env.scorer_cache import TokenScorer
from lmgym.env.vector import TokenVectorEnv

__all__ = [
    "ActionMaskFunction",
    "Finish",
    "OnLimit",
    "Outcome",
    "TokenAction",
    "TokenEnv",
    "TokenScorer",
    "TokenVectorEnv",
    "part_of",
]
