"""The spaces of one row."""

from typing import Any

import numpy as np
from gymnasium import Space, spaces


def make_spaces(vocabulary: int, length: int) -> tuple[Space[Any], Space[Any]]:
    """Observation and action space: `length` left-padded token ids with their mask, and the next token's id."""
    observation_space = spaces.Dict(
        {
            "input_ids": spaces.Box(0, vocabulary - 1, (length,), np.int64),
            "attention_mask": spaces.Box(0, 1, (length,), np.int8),
        }
    )
    return observation_space, spaces.Discrete(vocabulary)
