"""Ten thousand sequences of calls, right and wrong, against a model of the environment that holds nothing but lists."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.vector import AutoresetMode

import lmgym
from lmgym import Prompt, TokenAction, TokenEnv, TokenVectorEnv
from lmgym.env import Finish
from lmgym.tasks.probe import Tree

pytestmark = [pytest.mark.stress, pytest.mark.timeout(300)]

SEQUENCES = 10_000
PAD, EOS, P, T = 0, 1, 3, 3
LETTERS = {"a": 2, "b": 3, "c": 4, "d": 5}
NEXT, SAME, NEVER = AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED


class NoReference:
    """A reference that finds every token certain: the call sequences are what is tested, not the arithmetic."""

    def __init__(self, rows: int):
        self.stale, self.decoding = torch.zeros(rows, dtype=torch.bool), None

    def logp(self, token: torch.Tensor, action_mask: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(token))

    def advance(self, token: torch.Tensor, live: torch.Tensor) -> None:
        pass


@dataclass
class Row:
    prompt: str
    tokens: list[int] = field(default_factory=list)
    finish: int = Finish.RUNNING

    def take(self, token: int, stop: bool) -> None:
        self.tokens.append(token)
        self.finish = Finish.STOP if stop else Finish.LENGTH if len(self.tokens) == T else Finish.RUNNING

    @property
    def text(self) -> str:
        return "".join(letter for token in self.tokens for letter, id in LETTERS.items() if id == token)


@dataclass
class Model:
    """What the environment should hold, in lists."""

    mode: AutoresetMode
    truncate: bool
    rows: list[Row] = field(default_factory=list)

    def score(self, row: Row) -> float:
        if row.finish == Finish.LENGTH and self.truncate:
            return 0.0
        return Tree.scores.get(row.text, 0.0)

    def step(self, tokens: list[int]) -> tuple[list[float], list[bool], list[bool], list[int]]:
        """Rewards, terminated, truncated, and the rows that are reset."""
        rewards, terminated, truncated, reset = [], [], [], []
        for index, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
            if row.finish != Finish.RUNNING:
                reset.append(index)
                outcome = (0.0, False, False)
            else:
                row.take(token, token == EOS)
                cut = row.finish == Finish.LENGTH and self.truncate
                ended = row.finish != Finish.RUNNING
                outcome = (self.score(row) if ended else 0.0, ended and not cut, cut)
                if ended and self.mode is SAME:
                    reset.append(index)
            for column, value in zip((rewards, terminated, truncated), outcome, strict=True):
                column.append(value)
        return rewards, terminated, truncated, reset


@functools.cache
def environment(variant: int) -> tuple[TokenVectorEnv, Model]:
    """One of the kinds of environment, made once: a sequence begins with a reset, or with calls that need one."""
    output: Any
    mode, output, truncate = (NEXT, SAME, NEVER)[variant % 3], ("torch", "numpy")[variant // 3 % 2], variant % 5 == 0
    env = TokenVectorEnv(
        2, task=Tree(), model=lmgym.load("probe"), max_prompt_tokens=P, max_new_tokens=T, autoreset_mode=mode,
        output=output, kl="none" if variant % 2 else "sampled", beta=0.0, missing_eos_score=None,
        on_limit="truncate" if truncate else "terminate", render_mode="ansi",
    )  # fmt: skip
    if variant < 54:
        env._scorers["reference"] = NoReference(2)  # pyright: ignore[reportArgumentType]
    return env, Model(mode, truncate)


VARIANTS = 60
BAD_ACTIONS: tuple[Any, ...] = (
    None, "a", [1], [1, 2, 3], [[1, 2], [3]], [0.5, 1], [-1, 2], [2, 6], [2**40, 1], [2**70, 1], {}, [None, 2], True,
    np.array([True, False]), torch.tensor([2.0, 3.0]), torch.zeros(2, 2, dtype=torch.long),
    TokenAction([2], [0.0, 0.0]),
    TokenAction([2, 3], [0.0]), TokenAction([2, 3], None), TokenAction([2, 3], ["x", 0]), object(),
    TokenAction([2, 3], [float("inf"), 0.0]), TokenAction(None, [0.0, 0.0]), np.array([], np.int64),
)  # fmt: skip
BAD_RESETS: tuple[dict[str, Any], ...] = (
    {"seed": -1}, {"seed": "x"}, {"seed": [1]}, {"seed": [1, 2.5]}, {"seed": 1.0}, {"options": 5},
    {"options": {"prompt": None, "reset_mask": [True]}}, {"options": {"prompt": 5}}, {"options": {"prompt": ["a"]}},
    {"options": {"prompt": ["a", None]}}, {"options": {"prompt": ""}}, {"options": {"prompt": "abcd"}},
    {"options": {"prompt": "\ud800"}}, {"options": {"prompt": {"text": "a"}}}, {"options": {"reset_mask": "ab"}},
    {"options": {"reset_mask": [False, False]}}, {"options": {"reset_mask": [1, 0]}},
    {"options": {"reset_mask": [[1], []]}},
    {"options": {"prompt": ["a", "abcdabcd"]}}, {"options": {"reset_mask": np.array([True])}},
)  # fmt: skip


def snapshot(env: TokenVectorEnv) -> Any:
    return (
        env.length.tolist(),
        env.finish.tolist(),
        env.observation()["input_ids"].tolist(),
        [p.text for p in env.prompts],
    )


def refused(env: TokenVectorEnv, call: Callable[[], Any], what: object) -> None:
    """The call says in one line what is wrong, and changes nothing."""
    before = snapshot(env)
    try:
        call()
    except (ValueError, InvalidAction, ResetNeeded) as error:
        said = str(error)
        assert said, f"{what}: says nothing"
        assert "\n" not in said, f"{what}: {said}"
        assert len(said) < 600, f"{what}: {said}"
    else:
        raise AssertionError(f"{what} was let through")
    assert snapshot(env) == before, f"{what} changed something"


def agree(env: TokenVectorEnv, model: Model) -> None:
    """The environment holds what the lists hold."""
    assert env.length.tolist() == [len(row.tokens) for row in model.rows]
    assert env.finish.tolist() == [int(row.finish) for row in model.rows]
    state = env.observation()
    for index, row in enumerate(model.rows):
        whole = [LETTERS[letter] for letter in row.prompt] + row.tokens
        assert state["input_ids"][index].tolist() == [PAD] * (P + T - len(whole)) + whole
        assert int(state["attention_mask"][index].sum()) == len(whole)


def started(env: TokenVectorEnv, model: Model, indices: list[int]) -> None:
    for index in indices:
        model.rows[index] = Row(env.prompts[index].text)


def one_call(rng: np.random.Generator, env: TokenVectorEnv, model: Model) -> str:
    kind = int(rng.integers(10))
    if kind == 0:
        bad = BAD_RESETS[rng.integers(len(BAD_RESETS))]
        refused(env, lambda: env.reset(**bad), f"reset({bad})")
        return "wrong reset"
    if kind == 1:
        bad = BAD_ACTIONS[rng.integers(len(BAD_ACTIONS))]
        refused(env, lambda: env.step(bad), f"step({bad})")
        return "wrong step"
    if kind == 2:
        texts = ["a", "bcd", "da"]
        prompts: list[Any] = [texts[i] for i in rng.integers(3, size=2)]
        mask = [True, bool(rng.integers(2))]
        env.reset(
            seed=[None, int(rng.integers(99)), [3, None]][rng.integers(3)],
            options={"prompt": prompts if rng.integers(2) else [prompts[0], Prompt(prompts[1])], "reset_mask": mask},
        )
        assert all(env.prompts[index].text == prompts[index] for index in (0, 1) if mask[index])
        started(env, model, [index for index in (0, 1) if mask[index]])
        return "reset of some rows"
    if kind == 3:
        assert len(env.render()) == 2
        assert env.running_rows() == [i for i, row in enumerate(model.rows) if row.finish == Finish.RUNNING]
        assert [c.tokens for c in env.completions()] == [len(row.tokens) for row in model.rows]
        assert [c.text for c in env.completions()] == [row.text for row in model.rows]
        if env.running_rows():
            refused(env, env.pay_rewards, "pay_rewards() too early")
        return "look"
    tokens = [int(token) for token in rng.integers(1, 6, size=2)]
    actions: Any = [tokens, np.array(tokens), torch.tensor(tokens), np.array(tokens, np.uint8)][rng.integers(4)]
    actions = TokenAction(actions, [0.0, -1.0]) if env.kl == "sampled" else actions
    if model.mode is NEVER and any(row.finish != Finish.RUNNING for row in model.rows):
        refused(env, lambda: env.step(actions), "a step after the end")
        return "step after the end"
    if env.kl == "sampled" and kind == 4:
        # A step that cannot be paid is refused before anything moves.
        refused(env, lambda: env.step(tokens), "a step without log-probabilities")
        return "step without log-probabilities"
    _, rewards, terminated, truncated, info = env.step(actions)
    wanted = model.step(tokens)
    np.testing.assert_allclose(np.asarray(rewards), wanted[0], atol=1e-6)
    assert terminated.tolist() == wanted[1]
    assert truncated.tolist() == wanted[2]
    final = info.get("_final_obs")
    assert (final is not None and final.any()) == (
        model.mode is SAME and any(t or u for t, u in zip(*wanted[1:3], strict=True))
    )
    started(env, model, wanted[3])
    return "step"


def test_ten_thousand_sequences_of_calls() -> None:
    calls: dict[str, int] = {}
    for number in range(SEQUENCES):
        rng = np.random.default_rng([number, 2])
        env, model = environment(number % VARIANTS)
        if not model.rows or rng.integers(3) == 0:
            env.reset(seed=number)
            model.rows = [Row(prompt.text) for prompt in env.prompts]
        for _ in range(1 + rng.geometric(0.45)):
            try:
                name = one_call(rng, env, model)
                agree(env, model)
            except BaseException:
                print(f"in sequence {number}, variant {number % VARIANTS}")
                raise
            calls[name] = calls.get(name, 0) + 1
    print(f"\n{SEQUENCES} sequences, {sum(calls.values())} calls: {calls}")
    assert min(calls.values()) > 100, "every kind of call was made"


@pytest.mark.parametrize(
    "call", [lambda env: env.step([2, 3]), lambda env: env.reset(options={"reset_mask": [True, False]})]
)
def test_before_the_first_reset(call: Callable[[TokenVectorEnv], Any]) -> None:
    env = TokenVectorEnv(2, task=Tree(), model=lmgym.load("probe"), max_prompt_tokens=P, max_new_tokens=T)
    with pytest.raises(ResetNeeded):
        call(env)
    env.reset(seed=0)
    env.step([2, 3])


def test_a_thousand_sequences_of_the_single_environment() -> None:
    env = TokenEnv(task=Tree(), model=lmgym.load("probe"), max_prompt_tokens=P, max_new_tokens=T, kl="none")
    twin = TokenVectorEnv(
        1,
        task=Tree(),
        model=lmgym.load("probe"),
        max_prompt_tokens=P,
        max_new_tokens=T,
        kl="none",
        autoreset_mode=NEVER,
    )
    for each in (env.row, twin):
        each._scorers["reference"] = NoReference(1)  # pyright: ignore[reportArgumentType]
    for number in range(1000):
        rng = np.random.default_rng([number, 3])
        env.reset(seed=number)
        twin.reset(seed=number)
        ended = False
        for _ in range(rng.integers(1, 6)):
            bad = BAD_ACTIONS[rng.integers(len(BAD_ACTIONS))]
            if not (isinstance(bad, list) and len(bad) == 1):
                refused(env.row, lambda bad=bad: env.step(bad), bad)
            token = int(rng.integers(1, 6))
            if ended:
                refused(env.row, lambda token=token: env.step(token), "a step after the end")
                continue
            observation, reward, terminated, truncated, info = env.step(
                [token, np.int64(token), np.array(token)][token % 3]
            )
            wanted = twin.step([token])
            assert observation["input_ids"].tolist() == wanted[0]["input_ids"][0].tolist()
            assert (reward, terminated, truncated) == tuple(column[0].item() for column in wanted[1:4])
            assert info["finish_reason"] == Finish(int(wanted[4]["finish_reason"][0])).text
            ended = terminated or truncated
