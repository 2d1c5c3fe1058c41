"""Tasks of anything, by registration and by entry point: a clear complaint, and an environment that still works."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lmgym
from lmgym import Completion, Prompt, TokenVectorEnv
from lmgym.registry import TaskSpec, make_task
from lmgym.testing import check_task

pytestmark = [pytest.mark.stress, pytest.mark.timeout(300)]

EVERY: Any = list(HealthCheck)


class Own(Exception):
    """What a task itself raises: it is passed on as it is."""


def raising(*arguments: Any) -> Any:
    raise Own("of the task's own")


def prompt_of(text: Any) -> Prompt:
    prompt = Prompt("")
    object.__setattr__(prompt, "text", text)
    return prompt


PROMPTS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "text": lambda: "a",
    "number": lambda: prompt_of(5),
    "bytes": lambda: prompt_of(b"a"),
    "empty": lambda: Prompt(""),
    "long": lambda: Prompt("abcd" * 1000),
    "huge": lambda: Prompt("a" * 50_000),
    "half": lambda: Prompt("\ud800"),
    "special": lambda: Prompt("<eos>"),
    "raises": raising,
    "one letter": lambda: Prompt("a"),
    "fine": lambda: Prompt("ab"),
}
SCORES: dict[str, Callable[[int], Any]] = {
    "none": lambda n: None,
    "number": lambda n: 1.0,
    "few": lambda n: [0.0] * (n - 1),
    "many": lambda n: [0.0] * (n + 1),
    "endless": lambda n: itertools.repeat(0.0),
    "nan": lambda n: [float("nan")] * n,
    "infinite": lambda n: np.full(n, -np.inf),
    "beyond": lambda n: [10**400] * n,
    "beyond float32": lambda n: [-1e300] * n,
    "words": lambda n: ["good"] * n,
    "nones": lambda n: [None] * n,
    "lists": lambda n: [[1.0]] * n,
    "complex": lambda n: [1j] * n,
    "matrix": lambda n: np.zeros((n, 2)),
    "dict": lambda n: dict.fromkeys(range(n), 0.0),
    "raises": lambda n: raising(),
    "tensor": lambda n: torch.ones(n),
    "generator": lambda n: (0.5 for _ in range(n)),
    "fine": lambda n: [1.0] * n,
}


class Anything(lmgym.Task):
    """A task that gives what it is told to give."""

    name = "anything"
    stop: Any = ()

    def __init__(self, prompt: str, score: str):
        self.prompt, self.how = prompt, score

    def sample(self, rng: np.random.Generator, split: Any = "train") -> Any:
        return PROMPTS[self.prompt]()

    def score(self, prompts: Any, completions: Any) -> Any:
        return SCORES[self.how](len(completions))


GOOD_PROMPTS, GOOD_SCORES = {"fine", "one letter"}, {"fine", "tensor", "generator", "dict"}
PAIRS = [pair for pair in itertools.product(PROMPTS, SCORES) if pair[0] != "huge" or pair[1] == "fine"]


def drive(env: Any) -> None:
    env.reset(seed=0)
    for token in (2, 1, 3, 1):
        env.step(torch.tensor([token, 1]))


@pytest.fixture
def registered() -> Iterator[str]:
    name = "fuzz/Anything-v0"
    lmgym.register_task(name, lambda: Anything("fine", "fine"), model="probe", max_prompt_tokens=8, max_new_tokens=3)
    yield name
    del lmgym.registry.TASK_SPECS[name]
    del gym.registry[name]


@pytest.mark.parametrize("mode", list(gym.vector.AutoresetMode))
def test_tasks_of_anything(registered: str, mode: gym.vector.AutoresetMode) -> None:
    for prompt, score in PAIRS:
        task = Anything(prompt, score)
        env = gym.make_vec(registered, 2, task=task, autoreset_mode=mode).unwrapped
        good = prompt in GOOD_PROMPTS and score in GOOD_SCORES
        env_mask = {"reset_mask": np.array([True, True])}
        try:
            drive(env) if mode is not gym.vector.AutoresetMode.DISABLED else (env.reset(seed=0), env.step([1, 1]))
        except Own:
            assert "raises" in (prompt, score)
        except ValueError as error:
            said = str(error)
            assert not good, said
            assert "\n" not in said
            assert 20 < len(said) < 600, said[:300]
        else:
            assert good, f"{prompt} and {score} went unnoticed"
        task.prompt = task.how = "fine"
        env.reset(seed=0, options=env_mask)
        _, rewards, terminated, _, _ = env.step([1, 1])
        assert terminated.tolist() == [True, True], "after an error the environment works"
        assert bool(torch.isfinite(rewards).all())


def test_check_task_says_which_promise_is_broken() -> None:
    for prompt, score in PAIRS:
        said = ""
        try:
            check_task(Anything(prompt, score), draws=3, allow_shared_prompts=True)
        except Own:
            assert "raises" in (prompt, score)
        except AssertionError as error:
            said = str(error)
        if prompt in GOOD_PROMPTS and score in ("fine", "tensor", "generator"):
            assert not said
        if prompt not in GOOD_PROMPTS and score == "fine" and prompt in ("none", "text", "number", "bytes", "empty"):
            assert said
        assert len(said) < 6000


MAKERS: tuple[Any, ...] = (
    "", ":", "math", "math:", ":x", "no.such:x", "math:pi", "math:sin", "lmgym.tasks:Task", "lmgym:Prompt", "os:getcwd",
    "a b:c", "..:x", "lmgym.tasks:Sort:x", "\ud800:x", "json:loads", lambda: None,
    lambda: Prompt("a"), 5, None, Anything,
)  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
def test_registered_makers_of_anything(maker: Any) -> None:
    try:
        made = make_task(TaskSpec("fuzz/Maker-v0", maker, ""))
    except ValueError as error:
        said = str(error)
    except TypeError as error:  # of a class or function that wants arguments: its own complaint
        said = f"fuzz/Maker-v0 {error}"
    else:
        raise AssertionError(f"{maker!r} made {made!r}")
    assert "fuzz/Maker-v0" in said
    assert "\n" not in said


ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "max_prompt_tokens": st.integers(-2, 70),
        "max_new_tokens": st.integers(-2, 70),
        "min_new_tokens": st.integers(-2, 5),
        "beta": st.floats() | st.integers(-2, 2),
        "temperature": st.floats(),
        "kl": st.sampled_from(["reference", "sampled", "none", "k1", None, 5]),
        "kl_estimator": st.sampled_from(["k1", "k2", "k3", "x"]),
        "on_limit": st.sampled_from(["terminate", "truncate", "x"]),
        "banned_tokens": st.lists(st.integers(-2, 8), max_size=6),
        "stop": st.lists(st.text(max_size=2), max_size=2) | st.just("ab"),
        "missing_eos_score": st.floats() | st.sampled_from(["task", None, "x"]),
        "autoreset_mode": st.sampled_from([*gym.vector.AutoresetMode, "x", "Disabled"]),
        "output": st.sampled_from(["torch", "numpy", "x"]),
        "render_mode": st.sampled_from([None, "ansi", "human", "x"]),
        "split": st.sampled_from(["train", "test", "x"]),
        "num_envs": st.integers(-1, 3),
    },
)


@given(ARGUMENTS)
@settings(max_examples=400, suppress_health_check=EVERY)
def test_environments_of_any_arguments(arguments: dict[str, Any]) -> None:
    """Refused in one line when it is made, or it works."""
    try:
        env = TokenVectorEnv(**{"task": Anything("one letter", "fine"), "model": MODEL, **arguments})
    except ValueError as error:
        said = str(error)
        assert said
        assert "\n" not in said
        return
    env.reset(seed=0)
    token = int(np.flatnonzero(np.asarray(env.action_masks()[0]))[0])
    action: Any = torch.full((env.num_envs,), token)
    _, rewards, *_ = env.step(lmgym.TokenAction(action, [0.0] * env.num_envs) if env.kl == "sampled" else action)
    assert np.isfinite(np.asarray(rewards)).all()


MODEL: Any = lmgym.load("probe")


@given(st.text(max_size=6), st.sampled_from(["running", "stop", "length"]), st.integers(0, 9))
@settings(max_examples=200)
def test_built_in_tasks_score_any_text(text: str, finish: Any, tokens: int) -> None:
    for task in (lmgym.tasks.Sort(), lmgym.tasks.Reverse(), lmgym.tasks.Arithmetic(), lmgym.tasks.Sentiment()):
        prompt = task.sample(np.random.default_rng(0))
        (score,) = task.gold([prompt], [Completion(text, finish, tokens)])
        assert np.isfinite(score)
