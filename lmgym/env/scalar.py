"""`TokenEnv`: one row of `TokenVectorEnv` as a plain Gymnasium environment in NumPy."""

from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from lmgym.env.arguments import RenderMode
from lmgym.env.vector import TokenVectorEnv
from lmgym.tasks.base import Completion


class TokenEnv(gym.Env):
    """One row of `TokenVectorEnv` in NumPy: what `gymnasium.make` returns, and what SB3 and other libraries take.

    It takes the same arguments, except `num_envs`, `autoreset_mode` and `output`.
    """

    def __init__(self, *, render_mode: RenderMode | None = None, **arguments: Any):
        self.row = TokenVectorEnv(
            1, autoreset_mode=AutoresetMode.DISABLED, output="numpy", render_mode=render_mode, **arguments
        )
        self.metadata = {key: value for key, value in self.row.metadata.items() if key != "autoreset_mode"}
        self.observation_space = self.row.single_observation_space
        self.action_space = self.row.single_action_space
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Draws a new prompt, or takes `options["prompt"]`."""
        super().reset(seed=seed)
        self.row._rngs = [self.np_random]
        observation, info = self.row.reset(options=options)
        return first_row(observation), scalar_info(info)

    def step(self, action: Any) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Takes an action: a token id, or a `TokenAction`. See `TokenVectorEnv.step` for the errors."""
        observation, reward, terminated, truncated, info = self.row.step(action)
        # Python's own bool and float: both env checkers refuse NumPy's.
        return first_row(observation), float(reward[0]), bool(terminated[0]), bool(truncated[0]), scalar_info(info)

    def render(self) -> Any:
        """The text so far as a string or an image, see `TokenVectorEnv.render`."""
        frames = self.row.render()
        return frames[0] if frames else None

    def action_masks(self) -> np.ndarray:
        """[V] True where a token is allowed next; the name that sb3-contrib's MaskablePPO requires."""
        return self.row.action_masks()[0]

    def completion(self) -> Completion:
        """The text written so far."""
        return self.row.completions()[0]


def first_row(observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """An observation of one row, without the batch dimension."""
    return {key: value[0].copy() for key, value in observation.items()}


def scalar_info(infos: Mapping[str, Any]) -> dict[str, Any]:
    """The `info` of one row. Numbers are `np.float64`, which is a `float` with the dtype that TorchRL asks for."""
    return {
        "action_mask": infos["action_mask"][0].copy(),
        "reference_logp": np.float64(infos["reference_logp"][0]),
        "finish_reason": infos["finish_reason"][0],
        "score": np.float64(infos["score"][0]),
        "scores": {k: np.float64(v[0]) for k, v in infos["scores"].items() if not k.startswith("_")},
    }
