"""The pipeline: fine-tuning, preferences, reward model, RL, evaluation on held-out prompts."""

from agents.pipeline.build import TrainingSetup, build_training, rehearse
from agents.pipeline.options import Algorithm, Options, PreferenceOptions, RewardOptions, RLOptions, Setting, SFTOptions
from agents.pipeline.replay import Pass, Update, replay
from agents.pipeline.stages import (
    fine_tune,
    gather_preferences,
    learn_reward,
    run_all,
    split_comparisons,
    train_policy,
    train_reward_model,
)

__all__ = [
    "Algorithm",
    "Options",
    "Pass",
    "PreferenceOptions",
    "RLOptions",
    "RewardOptions",
    "SFTOptions",
    "Setting",
    "TrainingSetup",
    "Update",
    "build_training",
    "fine_tune",
    "gather_preferences",
    "learn_reward",
    "rehearse",
    "replay",
    "run_all",
    "split_comparisons",
    "train_policy",
    "train_reward_model",
]
