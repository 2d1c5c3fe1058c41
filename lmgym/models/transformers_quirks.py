"""What transformers and peft do by default and lmgym does not want: progress bars, warnings, dropout."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers.utils import logging as transformers_logging


@contextmanager
def quietly() -> Iterator[None]:
    """Loads and wraps models without progress bars, and without what peft and transformers warn each other about."""
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
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def without_dropout(model: nn.Module) -> None:
    """Puts a model into evaluation mode and sets every dropout to zero, for good.

    Dropout that stays on makes the ratio of the first PPO step 0.77 to 1.26 instead of 1.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = getattr(model, "config", None)
    for key in vars(config) if config is not None else ():
        if key.endswith(("dropout", "pdrop")) and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
