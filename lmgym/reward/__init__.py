"""The reward, `score · [token is last] − β · KL`: KL and its controllers, scores, and reward models."""

from lmgym.reward.ensemble import RewardEnsemble, load_reward_model
from lmgym.reward.kl import (
    AdaptiveKL,
    FixedKL,
    KLController,
    KLEstimator,
    KLForm,
    check_loss_estimator,
    check_reward_estimator,
    exact_kl,
    kl_estimates,
    kl_reward,
)
from lmgym.reward.model import BUILT_IN, RewardModel
from lmgym.reward.reading import read_text
from lmgym.reward.score import LARGEST_SCORE, Score, ScoreError
from lmgym.reward.trl import trl_reward

__all__ = [
    "BUILT_IN",
    "LARGEST_SCORE",
    "AdaptiveKL",
    "FixedKL",
    "KLController",
    "KLEstimator",
    "KLForm",
    "RewardEnsemble",
    "RewardModel",
    "Score",
    "ScoreError",
    "check_loss_estimator",
    "check_reward_estimator",
    "exact_kl",
    "kl_estimates",
    "kl_reward",
    "load_reward_model",
    "read_text",
    "trl_reward",
]
