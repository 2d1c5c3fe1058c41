"""The three render modes, in both environments, and what other libraries make of them."""

import itertools
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AddRenderObservation, RecordVideo, RenderCollection

import lmgym
from lmgym import LanguageModel, Prompt, TokenAction, TokenEnv, TokenVectorEnv
from lmgym.tasks.probe import Tree

PAD, EOS, A, B, C, D = range(6)


def make(lm: LanguageModel, rows: int = 1, **arguments: Any) -> TokenVectorEnv:
    defaults: dict[str, Any] = {"task": Tree(), "max_prompt_tokens": 4, "max_new_tokens": 3, "kl": "sampled"}
    return TokenVectorEnv(rows, model=lm, **(defaults | arguments))


def lost_and_gained(env: TokenVectorEnv) -> None:
    """A row whose first token loses reward, and whose second one gains some."""
    env.reset(seed=0, options={"prompt": "a"})
    for token, logp in ((B, 20.0), (C, -20.0)):
        env.step(TokenAction(torch.tensor([token]), torch.tensor([logp])))


def pixels(frame: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return tuple(frame[..., channel].astype(int) for channel in range(3))  # pyright: ignore[reportReturnType]


def count_of(colour: str, frame: np.ndarray) -> int:
    red, green, blue = pixels(frame)
    first, second = (red, green) if colour == "red" else (green, red)
    return int(((first > second + 30) & (first > blue + 30)).sum())


def test_images_are_equal_in_shape_and_show_the_text_as_it_grows(probe: LanguageModel) -> None:
    env = make(probe, 2, kl="none", render_mode="rgb_array")
    frames = [env.render()]
    env.reset(seed=0)
    frames.append(env.render())
    for token in (B, C):
        env.step([token, token])
        frames.append(env.render())
    for frame in frames:
        assert isinstance(frame, tuple)
        assert [(one.dtype, one.shape) for one in frame] == [(np.uint8, frames[0][0].shape)] * 2
    height, width, channels = frames[0][0].shape
    assert (height % 2, width % 2, channels) == (0, 0, 3), "video codecs take even sizes"
    for before, after in itertools.pairwise(frames):
        assert all((one != other).any() for one, other in zip(before, after, strict=True))


def test_images_have_the_colours_of_the_rewards(probe: LanguageModel) -> None:
    env = make(probe, render_mode="rgb_array")
    env.reset(seed=0, options={"prompt": "a"})
    prompt_only = env.render()[0]
    assert count_of("red", prompt_only) == count_of("green", prompt_only) == 0, "a prompt is neutral"
    lost_and_gained(env)
    (frame,) = env.render()
    red, green, _ = pixels(frame)
    assert count_of("red", frame) > 50, "b lost reward: red"
    assert count_of("green", frame) > 50, "c gained reward: green"
    where_red, where_green = np.nonzero(red > green + 30)[1], np.nonzero(green > red + 30)[1]
    assert where_red.mean() < where_green.mean(), "b stands before c"


def test_a_text_that_is_too_long_shows_its_end() -> None:
    lm = lmgym.load("tiny")
    env = TokenEnv(task=Tree(), model=lm, kl="none", max_prompt_tokens=120, max_new_tokens=2, render_mode="rgb_array")
    env.reset(options={"prompt": "\n".join("abcdefgh" * 4)})
    before = env.render()
    env.step(lm.text.encode("M")[0])
    after = env.render()
    assert after.shape == before.shape
    lines = np.nonzero((before != after).any((1, 2)))[0]
    assert lines.min() > before.shape[0] // 2, "the new token is on the last line"


@pytest.mark.parametrize("text", ["", "🙂 漢字", "\x1b[31m\t\n\n  x", "word" * 500, " " * 400])
def test_any_text_can_be_drawn(probe: LanguageModel, text: str) -> None:
    env = make(probe, render_mode="rgb_array")
    env.reset(seed=0, options={"prompt": "a"})
    env.state.prompts[0] = Prompt(text)
    assert env.render()[0].shape == make(probe, render_mode="rgb_array").render()[0].shape


def test_human_mode_prints_at_reset_and_step(capsys: pytest.CaptureFixture[str]) -> None:
    env = gym.make("lmgym/Tree-v0", render_mode="human", kl="none")
    env.reset(seed=0, options={"prompt": "a"})
    assert capsys.readouterr().out == "a\n"
    for token, text in ((B, "ab"), (C, "abc")):
        env.step(token)
        shown = capsys.readouterr().out
        assert shown.count("\n") == 1, "a line for each step"
        assert "".join(piece.partition("m")[2] for piece in f"m{shown}".split("\x1b[")) == f"{text}\n"


def test_human_mode_shows_the_last_token_of_a_row_that_is_reset(
    probe: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    for mode in ("SameStep", "NextStep"):
        env = make(probe, kl="none", render_mode="human", max_new_tokens=1, autoreset_mode=mode)
        env.reset(seed=0, options={"prompt": "a"})
        capsys.readouterr()
        env.step([D])
        first, *others = capsys.readouterr().out.splitlines()
        assert first.startswith("a\x1b[")
        assert "d" in first
        if mode == "NextStep":
            env.step([A])
            others = capsys.readouterr().out.splitlines()
        assert others == [env.prompts[0].text], "then the new prompt"


@pytest.mark.parametrize("mode", [None, "ansi", "rgb_array"])
def test_other_modes_print_nothing(probe: LanguageModel, mode: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lost_and_gained(make(probe, render_mode=mode))
    assert capsys.readouterr() == ("", "")


def test_gymnasiums_wrappers_take_the_images(tmp_path: Any) -> None:
    collected = RenderCollection(gym.make("lmgym/Sort-v0", render_mode="rgb_array", kl="none"))
    collected.reset(seed=0)
    collected.step(5)
    first, second = (np.asarray(frame) for frame in collected.render() or ())
    assert (first != second).any()
    shown = AddRenderObservation(gym.make("lmgym/Sort-v0", render_mode="rgb_array", kl="none"))
    observation, _ = shown.reset(seed=0)
    assert observation in shown.observation_space
    np.testing.assert_array_equal(observation, first)
    assert shown.step(5)[0] in shown.observation_space
    pytest.importorskip("moviepy")
    recorded = RecordVideo(gym.make("lmgym/Sort-v0", render_mode="rgb_array", kl="none"), str(tmp_path))
    recorded.reset(seed=0)
    recorded.step(1)
    recorded.close()
    assert list(tmp_path.glob("*.mp4"))


def test_sb3_makes_and_trains_an_environment_from_its_name() -> None:
    from stable_baselines3 import PPO

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = PPO("MultiInputPolicy", "lmgym/Sort-v0", n_steps=64, n_epochs=1, seed=0, device="cpu")
        model.learn(64)
    assert model.num_timesteps == 64
    env: Any = model.get_env()
    (frame,) = env.get_images()
    assert frame.dtype == np.uint8
