"""Rollouts: a policy acts in an environment, and a buffer on the device records the episodes."""

from lmgym.rollout.agreement import check_agreement
from lmgym.rollout.buffer import RolloutBuffer
from lmgym.rollout.collection import collect
from lmgym.rollout.stream import Stream
from lmgym.rollout.token_loop import decode

__all__ = ["RolloutBuffer", "Stream", "check_agreement", "collect", "decode"]
