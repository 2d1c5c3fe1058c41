"""How many tokens a model can read."""

from typing import Any

from torch import nn

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
"""The names that configs have for it; without any of these, a model has no limit (recurrent, ALiBi)."""


def position_limit(model: Any) -> int | None:
    """The largest number of tokens that a transformers model can read; None without a limit.

    RoBERTa and its kin keep the positions up to that of their padding token unused.
    """
    config = model.config.get_text_config()
    limit = next((found for name in _NAMES if isinstance(found := getattr(config, name, None), int)), None)
    if limit is None:
        return None
    unused = [
        table.padding_idx + 1
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and "position" in name and table.padding_idx is not None
        if table.num_embeddings == limit
    ]
    return limit - max(unused, default=0)
