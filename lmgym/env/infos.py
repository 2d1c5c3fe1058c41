"""Gymnasium's `info` dictionaries."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lmgym.env.outcome import Finish


def numpy_infos(infos: Mapping[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Gymnasium's form: every key with a boolean `_key` that says for which rows it holds, zeros elsewhere."""
    found: dict[str, Any] = {}
    for key, value in infos.items():
        if isinstance(value, dict):
            found[key] = numpy_infos(value, mask)
        elif key == "finish_reason":
            names = [Finish(code).text if valid else None for code, valid in zip(value.tolist(), mask, strict=True)]
            found[key] = np.array(names, dtype=object)
        else:
            array = value.cpu().numpy()
            array = array.astype(np.float64) if array.dtype == np.float32 else array
            found[key] = np.where(mask.reshape(-1, *[1] * (array.ndim - 1)), array, 0).astype(array.dtype)
        found[f"_{key}"] = mask.copy()
    return found
