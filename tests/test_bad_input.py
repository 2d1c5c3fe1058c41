"""What cannot be is refused where it is used, with the value and the remedy; what is counted twice is counted right."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction

import lmgym
from agents.learner import Learner, LearnerConfig
from lmgym import AdaptiveKL, Completion, FixedKL, LanguageModel, Policy, Prompt, Score, TokenAction, TokenVectorEnv
from lmgym.preferences import read_comparisons
from lmgym.tasks import PromptList
from lmgym.tasks.probe import Tree

SMALL: dict[str, Any] = {"max_prompt_tokens": 1, "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_envs": 0}, "num_envs=0 must be at least 1"),
        ({"stop": [""]}, "an empty string, which every text contains"),
        ({"missing_eos_score": float("nan")}, "missing_eos_score=nan must be a finite number"),
        ({"beta": -0.1}, "beta=-0.1 must be 0 or more"),
        ({"beta": float("nan")}, "beta=nan must be 0 or more"),
    ],
)
def test_an_environment_that_cannot_be(probe: LanguageModel, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenVectorEnv(**({"num_envs": 2, "task": Tree(), "model": probe} | SMALL | arguments))


def test_the_name_of_a_model_is_no_model() -> None:
    """The tests' own type checks see it first; users have none."""
    unchecked = TokenVectorEnv.__init__.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(ValueError, match=r"model='tiny' is no LanguageModel: load it first"):
        unchecked(object.__new__(TokenVectorEnv), 2, task=Tree(), model="tiny", **SMALL)


def test_controllers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"beta=-1\.0 must be 0 or more"):
        FixedKL(-1.0)
    with pytest.raises(ValueError, match=r"target_nats_per_sequence=0\.0 and horizon=10\.0 must be positive"):
        AdaptiveKL(0.1, 0.0, 10.0)


@pytest.mark.parametrize("action", ["x", None, ["a", "b"], [0.5, 1.5], [1], np.array([True, False]), [[1, 2], [3, 4]]])
def test_actions_that_are_no_tokens(probe: LanguageModel, action: Any) -> None:
    env = TokenVectorEnv(2, task=Tree(), model=probe, **SMALL)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match="expected 2 integer token ids"):
        env.step(action)
    assert not bool(env.length.any()), "nothing has changed"


def test_a_log_probability_that_is_no_number(probe: LanguageModel) -> None:
    env = TokenVectorEnv(2, task=Tree(), model=probe, kl="sampled", **SMALL)
    env.reset(seed=0)
    with pytest.raises(InvalidAction, match="expected finite log-probabilities"):
        env.step(TokenAction([2, 3], [-1.0, float("nan")]))


def test_scores_that_are_no_numbers_name_their_component() -> None:
    score = Score({"style": lambda prompts, completions: ["good"]})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the score 'style' must return one number per completion"):
        score([Prompt("a")], [Completion("b")])


def test_comparisons_name_the_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    file.write_text("\n".join(["", json.dumps(row), "", json.dumps(row | {"rejected": "b"})]))
    with pytest.raises(ValueError, match="line 4: a text is compared with itself"):
        read_comparisons(file)


def test_prompts_without_a_score_have_no_gold() -> None:
    task = PromptList([f"prompt {i}" for i in range(50)], None)
    assert not task.has_gold
    with pytest.raises(NotImplementedError, match="no score of their own"):
        task.gold([Prompt("a")], [Completion("b")])


def test_the_components_of_a_score_are_logged(probe: LanguageModel) -> None:
    def letters(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return [float(len(c.text)) for c in completions]

    probe.add_adapter("policy")
    policy = Policy(probe, critic="none")
    score = Score({"tree": Tree().score, "letters": (-0.5, letters)})
    env = TokenVectorEnv(16, task=Tree(), model=probe, kl="sampled", score=score, missing_eos_score=None, **SMALL)
    buffer = lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    row = Learner(policy.parameters(), LearnerConfig()).report(buffer, env)
    assert row["score/letters"] == pytest.approx(sum(len(c.text) for c in env.completions()) / 16)
    assert row["score/mean"] == pytest.approx(row["score/tree"] - 0.5 * row["score/letters"], abs=1e-6)


def test_a_reward_model_remembers_its_gain(tmp_path: Path) -> None:
    """σ((r_a − r_b) / gain) is the probability that it was trained to give, before and after saving."""
    model = lmgym.RewardModel.from_language_model(lmgym.load("tiny"), rank=0)
    texts = ["It was good.", "It was bad and slow."]
    before = model.score_texts(texts)
    model.scale(2.5)
    model.scale(2.0)
    after = model.score_texts(texts)
    torch.testing.assert_close(after / model.gain, before, atol=1e-5, rtol=1e-5)
    model.save(tmp_path / "model")
    assert lmgym.RewardModel.load(tmp_path / "model").gain == pytest.approx(5.0)
