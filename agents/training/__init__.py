"""Building blocks of `learner.py` and the algorithms: batches, metrics, checkpoint state, argument checks, extras."""

from agents.training.batch import Batch, Loss
from agents.training.extras import AdapterCopy, ReferenceRefresh, RunningScale, ScoreShaping, pretraining_loss
from agents.training.master_weights import MasterWeights
from agents.training.metrics import Metrics
from agents.training.microbatch import MicroBatches
from agents.training.minibatches import ShuffledMinibatches
from agents.training.moving_average import MovingAverage
from agents.training.nonfinite import BadStep, OnBadStep, StepGuard
from agents.training.stateful import State, Stateful

__all__ = [
    "AdapterCopy",
    "BadStep",
    "Batch",
    "Loss",
    "MasterWeights",
    "Metrics",
    "MicroBatches",
    "MovingAverage",
    "OnBadStep",
    "ReferenceRefresh",
    "RunningScale",
    "ScoreShaping",
    "ShuffledMinibatches",
    "State",
    "Stateful",
    "StepGuard",
    "pretraining_loss",
]
