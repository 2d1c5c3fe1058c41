"""`SB3VecEnv`: all rows of a `TokenVectorEnv` in one batched call, in Stable-Baselines3's interface."""

from collections.abc import Iterable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from jaxtyping import Bool
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from lmgym.env import Finish, TokenVectorEnv

ROW_ATTRIBUTES = ("prompts", "prompt_ids", "prompt_mask", "tokens", "length", "finish")


ROW_METHODS = ("action_masks", "completions", "render")


class SB3VecEnv(VecEnv):
    """All rows of a `TokenVectorEnv` as an SB3 VecEnv: one batched call a step.

    Observations, rewards (float32 [B]) and dones (bool [B]) are NumPy, copied from the device once a step. `info` of
    a row holds what `TokenEnv` gives (`action_mask`, `reference_logp`, `finish_reason`, `score`, `scores`), and
    `TimeLimit.truncated`; where the row ended, it is of the text that ended, with `terminal_observation` beside it,
    and what belongs to the next text is in `reset_infos`. Episode statistics: wrap it in SB3's VecMonitor.

    Args:
        env: in torch or NumPy, made with `autoreset_mode="SameStep"`. It is stepped and reset through this view only.

    Raises:
        ValueError: the environment has another autoreset mode, is wrapped, or needs log-probabilities (`kl="sampled"`).
    """

    def __init__(self, env: gym.vector.VectorEnv):
        if not isinstance(env, TokenVectorEnv):
            raise ValueError(
                f"SB3VecEnv takes a TokenVectorEnv, not {type(env).__name__}: pass what gymnasium.make_vec returns, "
                "without wrappers, and wrap the SB3VecEnv in SB3's wrappers (VecMonitor for episode statistics)"
            )
        if env.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise ValueError(
                f"the environment has autoreset_mode={env.autoreset_mode.value!r}, and SB3 expects a row to restart "
                "in the step in which it ends: make it with autoreset_mode='SameStep'"
            )
        if env.kl == "sampled":
            raise ValueError(
                "kl='sampled' needs the log-probability of each action, and SB3 gives only actions: make the "
                "environment with kl='none' and pass callback=SampledKL(beta), which pays the same, or kl='reference'"
            )
        self.env = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> dict[str, np.ndarray]:
        """Draws new prompts, with the seeds of `seed` and the prompts of `set_options({"prompt": ...})`, once."""
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        prompts = [options.get("prompt") for options in self._options]
        given = sum(prompt is not None for prompt in prompts)
        if 0 < given < self.num_envs:
            raise ValueError(
                f"set_options gives a prompt to {given} of {self.num_envs} rows: give one to every row, or to no row"
            )
        observation, infos = self.env.reset(seed=seeds, options={"prompt": prompts} if given else None)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = _infos_of_rows(infos, range(self.num_envs))
        return as_arrays(observation)

    def step_async(self, actions: np.ndarray) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Performs the actions of `step_async`, [B] token ids."""
        observation, rewards, terminated, truncated, infos = self.env.step(self._actions)
        terminated, truncated = as_array(terminated), as_array(truncated)
        dones = terminated | truncated
        rows = _infos_of_rows(infos, range(self.num_envs))
        if dones.any():
            ended = np.flatnonzero(dones).tolist()
            final = as_arrays(infos["final_obs"]) if isinstance(infos["final_obs"], dict) else infos["final_obs"]
            for row, info in zip(ended, _infos_of_rows(infos["final_info"], ended), strict=True):
                self.reset_infos[row], rows[row] = rows[row], info
                last = {key: x[row] for key, x in final.items()} if isinstance(final, dict) else final[row]
                info["terminal_observation"] = {key: x.copy() for key, x in last.items()}
        for info, cut in zip(rows, (truncated & ~terminated).tolist(), strict=True):
            info["TimeLimit.truncated"] = cut
        # A copy of its own: SB3 adds the bootstrap value, and SampledKL the KL, to this array in place.
        return as_arrays(observation), np.array(as_array(rewards), np.float32), dones, rows

    def close(self) -> None:
        self.env.close()

    def action_masks(self) -> Bool[np.ndarray, "B V"]:
        """True where a token is allowed next."""
        return as_array(self.env.action_masks())

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """One value per row: the row's own for `ROW_ATTRIBUTES`, otherwise the environment's."""
        value = getattr(self.env, attr_name)
        return [value[row] if attr_name in ROW_ATTRIBUTES else value for row in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Sets an attribute of the environment, which all rows share.

        Raises:
            ValueError: `indices` are not all rows.
        """
        self._all_rows(f"set_attr({attr_name!r})", indices)
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Calls a method once, and returns one value per row: the row's own for `ROW_METHODS`, otherwise the same one.

        Raises:
            ValueError: the method acts on all rows, and `indices` are not all rows.
        """
        if method_name not in ROW_METHODS:
            self._all_rows(f"env_method({method_name!r})", indices)
        value = getattr(self.env, method_name)(*method_args, **method_kwargs)
        if method_name not in ROW_METHODS or value is None:
            return [value for _ in self._get_indices(indices)]
        value = as_array(value) if isinstance(value, Tensor) else value
        return [value[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """False for every row: there are no scalar environments to wrap."""
        return [False for _ in self._get_indices(indices)]

    def _all_rows(self, what: str, indices: Any) -> None:
        if sorted(set(self._get_indices(indices))) != list(range(self.num_envs)):
            raise ValueError(f"{what} for rows {indices}: all rows share one environment, so do not pass indices")


def as_array(value: Any) -> np.ndarray:
    """A value as a NumPy array; a torch tensor may be on any device."""
    return value.cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def as_arrays(values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The values of a dict as NumPy arrays."""
    return {key: as_array(value) for key, value in values.items()}


def _infos_of_rows(infos: Mapping[str, Any], rows: Iterable[int]) -> list[dict[str, Any]]:
    """The infos of single rows, as `TokenEnv` gives them, from either output form of `TokenVectorEnv`."""
    masks, finish = as_array(infos["action_mask"]), as_array(infos["finish_reason"])
    reference_logp, score = as_array(infos["reference_logp"]), as_array(infos["score"])
    scores = {name: as_array(column) for name, column in infos["scores"].items() if not name.startswith("_")}
    return [
        {
            "action_mask": masks[row],
            "reference_logp": float(reference_logp[row]),
            "finish_reason": finish[row] if isinstance(finish[row], str) else Finish(int(finish[row])).text,
            "score": float(score[row]),
            "scores": {name: float(column[row]) for name, column in scores.items()},
        }
        for row in rows
    ]


def token_env(env: Any) -> TokenVectorEnv:
    """The `TokenVectorEnv` behind an SB3VecEnv, or behind SB3's own DummyVecEnv of a `TokenEnv` (of its first row).

    Raises:
        ValueError: there is no token environment.
    """
    base: Any = env.unwrapped if isinstance(env, (VecEnv, gym.Env, gym.vector.VectorEnv)) else env
    if isinstance(base, TokenVectorEnv):
        return base
    if isinstance(base, SB3VecEnv):
        return base.env
    try:
        return base.get_attr("row")[0] if isinstance(base, VecEnv) else base.row
    except AttributeError:
        raise ValueError(
            f"{type(base).__name__} is not a token environment: pass an SB3VecEnv, or one of lmgym"
        ) from None
