"""What cannot be is refused where it is used, with the value and the remedy; what is counted twice is counted right."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction

import lmgym
from agents import ppo
from agents.learner import Learner, LearnerConfig
from agents.pipeline import Options, PreferenceOptions, RewardOptions, RLOptions, SFTOptions, load_algorithm
from agents.runs import Limits
from agents.training import require
from lmgym import AdaptiveKL, Completion, FixedKL, LanguageModel, Policy, Prompt, Score, TokenAction, TokenVectorEnv
from lmgym.io import read_jsonl
from lmgym.registry import TaskSpec, make_task
from lmgym.tasks import PromptList
from lmgym.tasks.probe import Tree
from lmgym.testing import check_task

SMALL: dict[str, Any] = {"max_prompt_tokens": 1, "max_new_tokens": 3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_envs": 0}, "num_envs=0 must be at least 1"),
        ({"stop": [""]}, "an empty string, which every text contains"),
        ({"missing_eos_score": float("nan")}, "missing_eos_score=nan must be a finite number"),
        ({"beta": -0.1}, "beta=-0.1 must be 0 or more"),
        ({"beta": float("nan")}, "beta=nan must be 0 or more"),
        ({"missing_eos_score": "nothing"}, "missing_eos_score='nothing' must be a finite number"),
        ({"stop": "END"}, r"stop='END' must be a tuple of strings: a single one is \('END',\)"),
        ({"stop": [1]}, r"stop=\[1\] must be a tuple of strings"),
        ({"task": "Tree"}, "task='Tree' is not an lmgym.Task"),
    ],
)
def test_an_environment_that_cannot_be(probe: LanguageModel, arguments: dict[str, Any], said: str) -> None:
    """As users have it: the tests' own type checks would see some of them first."""
    unchecked = TokenVectorEnv.__init__.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    arguments = {"num_envs": 2, "task": Tree(), "model": probe} | SMALL | arguments
    with pytest.raises(ValueError, match=said):
        unchecked(object.__new__(TokenVectorEnv), **arguments)


def prompt_of(text: Any) -> Prompt:
    prompt = Prompt("")
    object.__setattr__(prompt, "text", text)
    return prompt


def unchecked(method: Any) -> Any:
    """A method as users have it, without the tests' own type checks."""
    return method.__func__.__wrapped__.__get__(method.__self__)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seed": -1}, "the seed -1 must be an int of 0 or more"),
        ({"seed": "1"}, "seed='1' must be an int"),
        ({"seed": 1.5}, "seed=1.5 must be an int"),
        ({"seed": [1]}, "1 seeds for 2 rows"),
        ({"seed": [1, "2"]}, "the seed '2' must be an int"),
        ({"options": ["prompt"]}, "must be a dict"),
        ({"options": {"prompt": 5}}, r"options\['prompt'\] is 5"),
        ({"options": {"prompt": [None, "a"]}}, r"options\['prompt'\] is None"),
        ({"options": {"prompt": prompt_of(5)}}, r"options\['prompt'\] is Prompt"),
        ({"options": {"prompt": "\ud800"}}, "lone surrogate"),
        ({"options": {"reset_mask": "all"}}, "must be 2 booleans"),
        ({"options": {"reset_mask": [[1], [2, 3]]}}, "must be 2 booleans"),
        ({"options": {"reset_mask": {}}}, "must be 2 booleans"),
    ],
)
def test_resets_that_cannot_be(probe: LanguageModel, arguments: dict[str, Any], said: str) -> None:
    env = TokenVectorEnv(2, task=Tree(), model=probe, **SMALL)
    env.reset(seed=0)
    before = env.observation()["input_ids"]
    with pytest.raises(ValueError, match=said):
        unchecked(env.reset)(**arguments)
    assert torch.equal(env.observation()["input_ids"], before), "nothing has changed"
    for seed in (np.int64(3), np.array([1, 2]), (1, None)):
        unchecked(env.reset)(seed=seed)
    env.step([2, 3])


class Hostile(Tree):
    """A task whose prompts and scores are whatever they are said to be."""

    def __init__(self, prompt: Any = None, scores: Any = (0.0, 0.0)):
        self.given, self.scores_given = prompt, scores

    def sample(self, rng: np.random.Generator, split: Any = "train") -> Any:
        return self.given

    def score(self, prompts: Any, completions: Any) -> Any:
        return self.scores_given


@pytest.mark.parametrize("prompt", [None, "a", 5, prompt_of(None), prompt_of(b"a")])
def test_tasks_that_give_no_prompts(probe: LanguageModel, prompt: Any) -> None:
    env = TokenVectorEnv(2, task=Hostile(prompt), model=probe, **SMALL)
    with pytest.raises(ValueError, match=r"the task 'tree' returned .* must return a Prompt with a text"):
        env.reset(seed=0)


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (None, "must return one number per completion, not None"),
        (5, "must return one number per completion, not 5"),
        ([None, 1], "must return one number per completion"),
        ([10**400, 0], "must return one number per completion"),
        ([1e39, 0], "scores must be finite, in float32"),
        ([float("nan"), 0], "returned nan for the completion"),
        ([], "returned 0 numbers for 2 completions"),
        (itertools.repeat(0.0), "returned more numbers for 2 completions"),
        (["x" * 10_000, 0], "not .{190,210}…"),
    ],
)
def test_tasks_that_give_no_scores(probe: LanguageModel, scores: Any, said: str) -> None:
    env = TokenVectorEnv(2, task=Hostile(Prompt("a"), scores), model=probe, **SMALL)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=said):
        env.step([1, 1])
    env.score = Score({"tree": lambda prompts, completions: [1.0] * len(completions)})
    env.reset(seed=0)
    assert env.step([1, 1])[1].max() <= 1.0, "after an error the environment still works"


def test_check_task_names_scores_that_are_no_numbers() -> None:
    for scores in (None, [None] * 6, itertools.repeat(0.0)):
        with pytest.raises(AssertionError, match=r"score\(\) (must give one number|gave 7 numbers)"):
            check_task(Hostile(Prompt("a"), scores), draws=3, allow_shared_prompts=True)


def test_weights_that_make_scores_infinite() -> None:
    ones: Any = lambda prompts, completions: [3e38] * len(completions)  # noqa: E731
    for weights in ((1e300, 1e300), (float("inf"), -float("inf")), (10.0, 10.0)):
        score = Score({"a": (weights[0], ones), "b": (weights[1], ones)})
        with pytest.raises(ValueError, match="the weighted sum of the scores a, b is not finite"):
            score([Prompt("a")], [Completion("b")])


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("no_such_module:Task", "No module named"),
        ("math:nothing", "no attribute 'nothing'"),
        ("math", "write it as module:name"),
        ("", "write it as module:name"),
        (lambda: 5, "makes 5, not an lmgym.Task"),
        ("math:pi", "not an lmgym.Task"),
    ],
)
def test_registered_tasks_that_cannot_be(task: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"'you/Hostile-v0'.*{said}"):
        make_task(TaskSpec("you/Hostile-v0", task, ""))


@pytest.mark.parametrize("rows", [[5], ["text"], [None], [["prompt", "x"]]])
def test_rows_that_are_no_mappings(rows: list[Any]) -> None:
    with pytest.raises(ValueError, match="dataset, row 1: not a mapping but"):
        PromptList.from_rows(iter(rows), None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "prompt": "b"}', "'prompt' occurs twice"),
        ('{"prompt": "a", "x": 1e999}', "1e999 is outside"),
        ('{"prompt": "a", "x": -Infinity}', "-Infinity is not a JSON number"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ('{"prompt": "a", "x": ' + "[" * 200 + "]" * 200 + "}", "nested deeper"),
        ('{"prompt": "a", "x": ' + "[" * 200_000, "nested deeper"),
        ('{"prompt": "a", "x": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_json_lines_that_would_lose_or_break_something(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine", "x": "\\ud83d\\ude42"}\n' + line)
    with pytest.raises(ValueError, match=f"line 2: .*{said}"):
        read_jsonl(file)


def test_the_name_of_a_model_is_no_model() -> None:
    """The tests' own type checks see it first; users have none."""
    unchecked = TokenVectorEnv.__init__.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
    with pytest.raises(ValueError, match=r"model='tiny' is not a LanguageModel: load it first"):
        unchecked(object.__new__(TokenVectorEnv), 2, task=Tree(), model="tiny", **SMALL)


def test_controllers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"beta=-1\.0 must be 0 or more"):
        FixedKL(-1.0)
    with pytest.raises(ValueError, match=r"target_nats_per_sequence=0\.0 and horizon=10\.0 must be positive"):
        AdaptiveKL(0.1, 0.0, 10.0)


@pytest.mark.parametrize(
    "action",
    [
        "x", None, ["a", "b"], [0.5, 1.5], [1], np.array([True, False]), [[1, 2], [3, 4]], [[1], [2, 3]], {}, object(),
        torch.tensor([True, False]), torch.tensor([1j, 2j]), [2**70, 1], [1 + 2j, 1],
        np.array(["2020-01-01"] * 2, "M8[D]"),
    ],
)  # fmt: skip
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
    for logp in (None, "x", [None, 1.0], [[1.0], [1.0, 2.0]], torch.tensor([True, True])):
        with pytest.raises(InvalidAction, match="expected finite log-probabilities"):
            env.step(TokenAction([2, 3], logp))
    for token in (2**63, -1, 6, 2**64 - 1):
        with pytest.raises(InvalidAction, match="outside the vocabulary"):
            env.step(TokenAction(np.array([token, 0], np.uint64 if token >= 0 else np.int64), [0.0, 0.0]))


def test_scores_that_are_no_numbers_name_their_component() -> None:
    score = Score({"style": lambda prompts, completions: ["good"]})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="the score 'style' must return one number per completion"):
        score([Prompt("a")], [Completion("b")])


def test_prompts_without_a_score_have_no_gold() -> None:
    task = PromptList([f"prompt {i}" for i in range(50)], None)
    assert not task.has_gold
    with pytest.raises(NotImplementedError, match="no score of their own"):
        task.gold([Prompt("a")], [Completion("b")])


def test_the_components_of_a_score_are_logged(probe: LanguageModel) -> None:
    def letters(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float]:
        return [float(len(c.text)) for c in completions]

    probe.adapters.add("policy")
    policy = Policy(probe, critic="none")
    score = Score({"tree": Tree().score, "letters": (-0.5, letters)})
    env = TokenVectorEnv(16, task=Tree(), model=probe, kl="sampled", score=score, missing_eos_score=None, **SMALL)
    buffer = lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    row = Learner(policy.parameters(), LearnerConfig()).summarise(buffer)
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


# Settings ----------------------------------------------------------------------------------------------------------

CONFIGS = [
    *(import_module(f"agents.{name}").Config for name in (*load_algorithm.BUILT_IN, "sft", "reward_modelling")),
    LearnerConfig, RLOptions, SFTOptions, RewardOptions, PreferenceOptions, Options, Limits,
]  # fmt: skip
NUMBERS = [
    (kind, f.name)
    for kind in CONFIGS
    for f in fields(kind)
    if type(f.default) in (int, float) and f.name != "group"  # checked against the rows when training begins
]


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda value: getattr(value, "__module__", value))
def test_every_number_of_a_setting_has_a_range(kind: Any, name: str) -> None:
    whole = isinstance(getattr(kind(), name), int)
    for value in (-(10**9),) if whole else (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (ppo.Config, "gamma", 2.0),
        (ppo.Config, "lam", 1.5),
        (ppo.Config, "clip", -1.0),
        (RLOptions, "rows", 0),
        (LearnerConfig, "schedule", "cosin"),
        (LearnerConfig, "warmup", 1.1),
    ],
)
def test_settings_out_of_range_name_themselves(kind: Any, name: str, value: Any) -> None:
    config = kind()
    object.__setattr__(config, name, value)  # past the type checks of these tests, which users do not have
    with pytest.raises(ValueError, match=name):
        config.__post_init__()


@pytest.mark.parametrize("value", [None, [], ""])
def test_what_is_needed_and_empty_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="dpo needs comparisons, but got none: give some"):
        require.given(value, "comparisons", "dpo", "give some")
    require.given(["one"], "comparisons", "dpo", "give some")


SMALLEST = {
    "updates": 0, "minibatch_rows": 0, "minibatch_pairs": 0, "reference_refresh": 0, "micro_tokens": 0,
    "epochs": 1, "ptx_rows": 1, "keep": 1, "mask_refresh": 1, "minibatch_prompts": 1, "max_tokens": 1,
}  # fmt: skip
"""The smallest count allowed."""
FROM_ONE = {
    ("agents.dpo", "minibatch_pairs"), ("agents.sft", "minibatch_rows"), ("agents.pipeline.options", "minibatch_rows"),
}  # fmt: skip
"""Where 0 does not stand for the whole rollout, because there is no rollout."""
SHARES = ("gamma", "lam")
ABOVE_ZERO = ("clip", "clip_high", "adam_eps")
NOT_NEGATIVE = (
    "dual_clip", "value_clip", "value_coef", "score_clip", "target_kl", "ptx_coef", "lr", "max_grad_norm",
    "weight_decay",
)  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), NUMBERS, ids=lambda value: getattr(value, "__module__", value))
def test_the_borders_of_a_range(kind: Any, name: str) -> None:
    smallest = 1 if (kind.__module__, name) in FROM_ONE else SMALLEST.get(name)
    allowed: list[Any] = []
    refused: list[Any] = []
    if smallest is not None:
        allowed, refused = [smallest], [smallest - 1]
    elif name in SHARES:
        allowed, refused = [0.0, 1.0], [-0.01, 1.01]
    elif name in ABOVE_ZERO:
        allowed, refused = [1e-6, 3.0], [0.0, -0.5]
    elif name == "label_smoothing":  # from ½ on, the label would be wrong at least as often as right
        allowed, refused = [0.0, 0.49], [-0.01, 0.5, 1.0]
    elif name in NOT_NEGATIVE:
        allowed, refused = [0.0, 3.0], [-1e-6]
    for value in allowed:
        assert getattr(kind(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(ValueError, match=name):
            kind(**{name: value})
