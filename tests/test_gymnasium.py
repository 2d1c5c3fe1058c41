"""What others rely on: both env checkers, Gymnasium's own vector environment, and SB3's algorithms, unmodified."""

import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import full, slow
from gymnasium.utils.env_checker import check_env as gymnasium_check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import lmgym
from lmgym import TokenEnv, TokenVectorEnv
from lmgym.registry import TASK_SPECS
from lmgym.tasks.probe import Tree

MODES = list(AutoresetMode)


@pytest.mark.parametrize("arguments", [{}, {"on_limit": "truncate", "kl": "none"}], ids=["terminate", "truncate"])
@pytest.mark.parametrize("id", sorted(id for id in TASK_SPECS if id.startswith("lmgym/")))
def test_every_environment_passes_both_checkers(id: str, arguments: dict[str, Any]) -> None:
    """Needs the models in lmgym/assets."""
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    if "truncate" in arguments.values() and TASK_SPECS[id].arguments["max_new_tokens"] == 1:
        pytest.skip("a budget of one token cannot truncate: a row may not end at its first step")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(id, **arguments)
        gymnasium_check_env(env.unwrapped)
        sb3_check_env(env.unwrapped)
        env.close()


def equal(ours: Any, theirs: Any, where: str) -> None:
    if isinstance(theirs, dict):
        assert set(ours) == set(theirs), where
        for key in theirs:
            equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype, where
        assert ours.shape == theirs.shape, where
        if theirs.dtype == object:
            for i, (our, their) in enumerate(zip(ours.flat, theirs.flat, strict=True)):
                equal(our, their, f"{where}[{i}]")
        elif theirs.dtype.kind == "f":
            np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0, err_msg=where)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=where)
    else:
        assert ours == theirs, where


@pytest.mark.parametrize("steps", [30, full(400)])
@pytest.mark.parametrize("on_limit", ["terminate", "truncate"])
@pytest.mark.parametrize("mode", MODES, ids=[mode.name for mode in MODES])
def test_the_vector_environment_equals_gymnasiums_of_scalar_ones(
    probe: lmgym.LanguageModel, mode: AutoresetMode, on_limit: str, steps: int
) -> None:
    arguments: dict[str, Any] = {
        "task": Tree(),
        "model": probe,
        "max_prompt_tokens": 3,
        "max_new_tokens": 4,
        "on_limit": on_limit,
        "stop": ("bc",),
    }
    ours = TokenVectorEnv(3, autoreset_mode=mode, output="numpy", **arguments)
    theirs = SyncVectorEnv([lambda: TokenEnv(**arguments)] * 3, autoreset_mode=mode)
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    for our, their, name in zip(ours.reset(seed=5), theirs.reset(seed=5), ("observation", "infos"), strict=True):
        equal(our, their, f"reset {name}")
    theirs.action_space.seed(0)
    ends = {"terminated": 0, "truncated": 0}
    for step in range(steps):
        action = theirs.action_space.sample()
        found, expected = ours.step(action), theirs.step(action)
        for our, their, name in zip(
            found, expected, ("observation", "reward", "terminated", "truncated", "infos"), strict=True
        ):
            equal(our, their, f"step {step} {name}")
        ends["terminated"] += int(expected[2].sum())
        ends["truncated"] += int(expected[3].sum())
        done = expected[2] | expected[3]
        if mode is AutoresetMode.DISABLED and done.any():
            for our, their, name in zip(
                ours.reset(options={"reset_mask": done.copy()}),
                theirs.reset(options={"reset_mask": done.copy()}),
                ("observation", "infos"),
                strict=True,
            ):
                equal(our, their, f"step {step} reset {name}")
    assert ends["terminated"] > steps / 10
    assert (ends["truncated"] > steps / 20) == (on_limit == "truncate")


def test_make_vec_gives_the_native_environment_and_wrappers_count_right(probe: lmgym.LanguageModel) -> None:
    env = gym.make_vec("lmgym/Tree-v0", num_envs=4, model=probe, output="numpy", kl="none", autoreset_mode="SameStep")
    assert isinstance(env, TokenVectorEnv)
    counted = gym.wrappers.vector.RecordEpisodeStatistics(env)
    counted.reset(seed=0)
    a, eos = 2, 1
    counted.step(np.full(4, a))
    *_, infos = counted.step(np.array([a, eos, a, eos]))
    assert infos["episode"]["l"].tolist() == [0, 2, 0, 2]
    sync = gym.make_vec("lmgym/Tree-v0", num_envs=2, vectorization_mode="sync", model=probe)
    assert isinstance(sync, SyncVectorEnv)


# SB3 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PPO", *map(slow, ["A2C", "DQN", "MaskablePPO"])])
def test_unmodified_agents_of_others_train(name: str) -> None:
    """Warnings are errors here; no filter is needed."""
    import sb3_contrib
    import stable_baselines3

    settings: dict[str, dict[str, Any]] = {
        "PPO": {"n_steps": 32, "batch_size": 16, "n_epochs": 1},
        "A2C": {"n_steps": 16},
        "DQN": {"learning_starts": 16, "batch_size": 16, "train_freq": 16, "buffer_size": 200},
        "MaskablePPO": {"n_steps": 32, "batch_size": 16, "n_epochs": 1},
    }
    agent = getattr(sb3_contrib if name == "MaskablePPO" else stable_baselines3, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for id in ("lmgym/Tree-v0", "lmgym/Bandit-v0"):
            env = gym.make(id)
            model = agent("MultiInputPolicy", env, gamma=1.0, seed=0, device="cpu", **settings[name])
            model.learn(64)
            observation, info = env.reset(seed=0)
            more = {"action_masks": info["action_mask"].astype(bool)} if name == "MaskablePPO" else {}
            for _ in range(5):
                action, _ = model.predict(observation, deterministic=False, **more)
                if name == "MaskablePPO":
                    assert int(action) != 0, "padding is masked"


def test_torch_observations_live_on_the_device(probe: lmgym.LanguageModel) -> None:
    env = TokenVectorEnv(2, task=Tree(), model=probe, max_prompt_tokens=2, max_new_tokens=2)
    obs, info = env.reset(seed=0)
    assert all(isinstance(value, torch.Tensor) for value in (*obs.values(), info["action_mask"]))
    obs, rewards, terminated, truncated, info = env.step(torch.tensor([1, 2]))
    assert (rewards.dtype, terminated.dtype, truncated.dtype) == (torch.float32, torch.bool, torch.bool)


@pytest.mark.parametrize("name", ["RecordEpisodeStatistics", "NormalizeReward", "DictInfoToList"])
def test_vector_wrappers_that_compute_in_numpy(probe: lmgym.LanguageModel, name: str) -> None:
    """With torch output they would fail in the middle of their own code; with NumPy they work, stacked ones too."""
    wrapper = getattr(gym.wrappers.vector, name)
    torch_env = gym.make_vec("lmgym/Tree-v0", num_envs=2, model=probe)
    stacked = gym.wrappers.vector.TransformReward(torch_env, lambda reward: reward)
    for env in (torch_env, stacked):
        with pytest.raises(ValueError, match=f"{name} computes in NumPy.*output='numpy'"):
            wrapper(env).reset(seed=0)
    assert isinstance(stacked.reset(seed=0)[0]["input_ids"], torch.Tensor), "other wrappers take torch as it is"
    env = wrapper(gym.make_vec("lmgym/Tree-v0", num_envs=2, model=probe, output="numpy"))
    env.reset(seed=0)
    ended = 0
    for _ in range(6):
        _, _, terminated, _, infos = env.step(np.array([1, 2]))
        ended += int(terminated.sum())
        if name == "RecordEpisodeStatistics" and terminated.any():
            assert infos["episode"]["l"][terminated].min() >= 1
    assert ended
