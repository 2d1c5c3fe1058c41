"""Gymnasium's `info` dictionaries, in torch and in NumPy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from lmgym.env.rewards import RowRewards
from lmgym.env.row_state import Finish, RowState


def make_infos(state: RowState, rewards: RowRewards, output: str, valid: Tensor | None = None) -> dict[str, Any]:
    """The infos of all rows.

    Args:
        state: gives `action_mask` and `finish_reason`.
        rewards: gives `reference_logp`, `score` and `scores`.
        output: "torch" or "numpy".
        valid: [B] the rows for which the infos hold; None is all. Used in NumPy, which has a mask for each key.
    """
    infos: dict[str, Any] = {
        "action_mask": state.action_mask().to(state.finish.dtype),  # int8
        "reference_logp": rewards.reference_logp.clone(),
        "finish_reason": state.finish.clone(),
        "score": rewards.score.clone(),
        "scores": {name: column.clone() for name, column in rewards.breakdown.items()},
    }
    if output == "torch":
        return infos
    mask = np.ones(state.rows, np.bool_) if valid is None else valid.cpu().numpy()
    return _numpy_infos(infos, mask)


def make_final_infos(observation: Mapping[str, Any], info: Mapping[str, Any], done: Tensor) -> dict[str, Any]:
    """`final_obs` and `final_info`: stacked tensors in torch, Gymnasium's object array and masks in NumPy."""
    if isinstance(observation["input_ids"], Tensor):
        return {"final_obs": observation, "_final_obs": done, "final_info": info, "_final_info": done}
    mask = done.cpu().numpy()
    rows = np.full(len(mask), None, dtype=object)
    for row in np.flatnonzero(mask):
        rows[row] = {key: value[row].copy() for key, value in observation.items()}
    return {"final_obs": rows, "_final_obs": mask, "final_info": info, "_final_info": mask.copy()}


def convert(value: Any, output: str) -> Any:
    """Tensors, in dicts and tuples too, as tensors ("torch") or as arrays ("numpy")."""
    if output == "torch":
        return value
    if isinstance(value, dict):
        return {key: convert(v, output) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(convert(v, output) for v in value)
    return value.cpu().numpy()


def _numpy_infos(infos: Mapping[str, Any], mask: np.ndarray) -> dict[str, Any]:
    """Gymnasium's form: every key has a boolean `_key` that tells for which rows it holds; other rows hold zeros."""
    converted: dict[str, Any] = {}
    for key, value in infos.items():
        if isinstance(value, dict):
            converted[key] = _numpy_infos(value, mask)
        elif key == "finish_reason":
            names = [Finish(code).text if valid else None for code, valid in zip(value.tolist(), mask, strict=True)]
            converted[key] = np.array(names, dtype=object)
        else:
            array = value.cpu().numpy()
            array = array.astype(np.float64) if array.dtype == np.float32 else array
            converted[key] = np.where(mask.reshape(-1, *[1] * (array.ndim - 1)), array, 0).astype(array.dtype)
        converted[f"_{key}"] = mask.copy()
    return converted
