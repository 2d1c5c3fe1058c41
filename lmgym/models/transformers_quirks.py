"""Tames transformers and peft: no progress bars, warnings or dropout, and one thread at a time."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

ONE_AT_A_TIME = threading.RLock()
"""Loading changes global state: transformers replaces functions of torch meanwhile, and here its messages are switched
off and torch's generator is seeded. Two threads that did so together would spoil it for the whole process."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs the body with torch's global CPU generator seeded, in one thread at a time, and puts it back."""
    with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Runs the body without progress bars, log messages and known harmless warnings of transformers and peft.

    One thread at a time: everything here that loads, saves or changes a model runs in it.
    """
    with ONE_AT_A_TIME, _silenced():
        yield


@contextmanager
def _silenced() -> Iterator[None]:
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
            warnings.filterwarnings(
                "ignore", message="Adapter .* was active which is now deleted", category=UserWarning
            )
            warnings.filterwarnings(
                "ignore", message="The following (rank|alpha)_pattern keys", category=RuntimeWarning
            )
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def disable_dropout(model: nn.Module) -> None:
    """Puts a model into evaluation mode and sets every dropout probability to zero, permanently.

    With dropout, the probability ratios of the first PPO step are 0.77 to 1.26 instead of 1. Many architectures have no
    module for it, but read a number of their own or of their config in each pass.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _zero_dropout(module)
    config: Any = getattr(model, "config", None)
    if config is not None:
        _zero_dropout(config)
        _zero_dropout(config.get_text_config())


def _zero_dropout(holder: Any) -> None:
    for key, value in vars(holder).items():
        if isinstance(value, float) and "drop" in key:
            setattr(holder, key, 0.0)


def keep_evaluating(model: nn.Module) -> None:
    """Puts a model back into evaluation mode if somebody has changed that: some add noise to the routing of experts."""
    if model.training:
        model.train(mode=False)
