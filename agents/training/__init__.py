"""What `learner.py` and the algorithms are made of: batches, metrics, state for checkpoints, requirements, extras."""

from agents.training.batch import Batch, Loss
from agents.training.extras import AdapterCopy, RunningScale
from agents.training.metrics import Metrics
from agents.training.minibatches import ShuffledMinibatches
from agents.training.nonfinite import BadStep, OnBadStep
from agents.training.stateful import State, Stateful

__all__ = [
    "AdapterCopy",
    "BadStep",
    "Batch",
    "Loss",
    "Metrics",
    "OnBadStep",
    "RunningScale",
    "ShuffledMinibatches",
    "State",
    "Stateful",
]
