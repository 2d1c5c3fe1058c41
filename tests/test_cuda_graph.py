"""Decoding in steps that a CUDA graph can replay, against the ordinary loop; on a CPU a tape replaces the graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import as_on_an_accelerator, random_model, slow
from test_fast import FUSED, assert_same_rollout, made, perturb, rollout
from test_rollout import Waits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from lmgym import LanguageModel, Policy, RolloutBuffer, Stream, TokenVectorEnv, collect
from lmgym.env import Finish
from lmgym.rollout import cuda_graph
from lmgym.rollout.cuda_graph import CapturedLoop, CapturedStep


class Recorder(TorchDispatchMode):
    """Records every operation with its inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.found.append((func, args, kwargs or {}, result))
        return result


class Tape(CapturedStep):
    """What a CUDA graph does, on a CPU: the operations of one call, again and again on the same memory.

    Whatever Python would do anew at a step, such as counting, is not done.
    """

    made: list["Tape"] = []

    def __init__(self, function: Callable[[], None], device: torch.device):
        super().__init__(function, device)
        self.left, self.calls, self.tape = 1, 0, Recorder()
        self.made.append(self)

    def __call__(self) -> None:
        self.calls += 1
        if self.calls <= self.left:
            self.function()
        elif not self.tape.found:
            with self.tape:
                self.function()
        else:
            for func, args, kwargs, result in self.tape.found:
                for kept, new in zip(tree_flatten(result)[0], tree_flatten(func(*args, **kwargs))[0], strict=True):
                    if isinstance(kept, Tensor) and kept.data_ptr() != new.data_ptr():  # else a view, or in place
                        kept.copy_(new)


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are captured by a tape."""
    monkeypatch.setattr("lmgym.rollout.cuda_graph.can_capture", lambda device: True)
    monkeypatch.setattr("lmgym.rollout.cuda_graph.CapturedStep", Tape)
    monkeypatch.setattr(Tape, "made", [])
    monkeypatch.setattr("lmgym.rollout.token_loop.CHECK_INTERVAL", 3)


@pytest.fixture
def uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps, run without capture."""
    monkeypatch.setattr("lmgym.rollout.cuda_graph.can_capture", lambda device: True)
    monkeypatch.setattr("lmgym.rollout.cuda_graph.CapturedStep", lambda function, device: function)
    monkeypatch.setattr("lmgym.rollout.token_loop.CHECK_INTERVAL", 3)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"min_new_tokens": 3},
    {"critic": "adapter", "on_limit": "truncate"},
    {"layers": 1},
    {"temperature": 0.7, "critic": "none"},
]


def twin(lm: LanguageModel, **arguments: Any) -> tuple[Policy, TokenVectorEnv]:
    policy, env = made(lm, rows=32, **arguments)
    policy.temperature = env.reference.temperature
    return policy, env


@pytest.mark.parametrize("how", ["uncaptured", "taped"])
@pytest.mark.parametrize("arguments", SETTINGS)
@pytest.mark.parametrize("config", ["GPT2Config", "LlamaConfig", slow("Qwen3Config")])
def test_steps_that_are_all_alike_write_the_same(
    config: str, arguments: dict[str, Any], how: str, request: pytest.FixtureRequest
) -> None:
    """Observed between log-probabilities: 2e-7 nats on average, 7e-6 at most. Rows leave by halves."""
    policy, env = twin(random_model(config, **FUSED[config]), max_new_tokens=30, **arguments)
    ordinary = rollout(policy, env)
    request.getfixturevalue(how)
    buffer = rollout(policy, env)
    assert buffer.loop is not None
    assert len(buffer.loop.rows) < 32 or int((ordinary.finish == Finish.STOP).sum()) < 24
    assert_same_rollout(buffer, ordinary)
    assert float((buffer.logp - ordinary.logp).abs().mean()) < 1e-6
    if "layers" in arguments:
        assert buffer.frozen_prefix is not None
        assert ordinary.frozen_prefix is not None
        read = buffer.prompt_mask.sum(1) + buffer.is_action.sum(1) - 1
        inside = torch.arange(ordinary.frozen_prefix.hidden.shape[1]) < read[:, None]
        torch.testing.assert_close(
            buffer.frozen_prefix.hidden[inside], ordinary.frozen_prefix.hidden[inside], atol=1e-5, rtol=1e-5
        )


def test_what_was_captured_serves_later_rollouts_with_other_weights_and_prompts(taped: None) -> None:
    policy, env = twin(random_model("LlamaConfig"))
    buffer = RolloutBuffer.like(env)
    for update in range(4):
        perturb(policy.lm.adapters.parameters("policy"), seed=update)
        perturb(list(policy.value_head.parameters()), seed=update)
        collect(policy, env, buffer, Stream(3, update))
        policy.lm.capture = False
        assert_same_rollout(buffer, collect(policy, env, RolloutBuffer.like(env), Stream(3, update)))
        policy.lm.capture = True
    assert 1 <= len(Tape.made) <= 1 + cuda_graph.HALVINGS, "captured once for each number of rows"


def test_a_model_that_moved_is_captured_anew(taped: None) -> None:
    policy, env = twin(random_model("LlamaConfig"))
    buffer = RolloutBuffer.like(env)
    collect(policy, env, buffer, Stream(3, 0))
    before, first = len(Tape.made), buffer.loop
    policy.lm.to(dtype=torch.float64).to(dtype=torch.float32)
    collect(policy, env, buffer, Stream(3, 1))
    assert buffer.loop is first
    assert len(Tape.made) > before
    policy.lm.capture = False
    assert_same_rollout(buffer, collect(policy, env, RolloutBuffer.like(env), Stream(3, 1)))


@pytest.mark.parametrize("config", ["GPT2Config", "LlamaConfig"])
def test_every_step_is_the_same_operations_and_asks_nothing(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture needs the same operations with the same shapes and numbers, and no synchronisation."""
    as_on_an_accelerator(monkeypatch)
    policy, env = twin(random_model(config, **FUSED[config]), critic="adapter")
    buffer = RolloutBuffer.like(env)
    env.reset(seed=0)
    loop = CapturedLoop(policy, env, buffer)
    steps: list[list[Any]] = []
    with torch.inference_mode():
        loop.begin(policy.start(*env.prompt_block()), Stream(3, 0).uniforms(32, env.max_new_tokens, policy.device))
        loop.step()  # allocates the memory that later steps reuse
        for _ in range(3):
            waits, recorder = Waits(), Recorder()
            waits.on = True
            with waits, recorder:
                loop.step()
            assert not waits.found
            steps.append([described(*record) for record in recorder.found])
    assert steps[0] == steps[1] == steps[2]
    assert len(steps[0]) > 50


def described(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
    leaves, spec = tree_flatten((args, kwargs))
    told = [(x.shape, x.stride(), x.dtype) if isinstance(x, Tensor) else x for x in leaves]
    return func, str(tree_unflatten(told, spec))


def test_rows_leave_by_halves(taped: None) -> None:
    policy, env = twin(random_model("LlamaConfig"), max_new_tokens=30)
    buffer = rollout(policy, env)
    assert buffer.loop is not None
    sizes = set(buffer.loop._stages)
    assert sizes <= {32, 16, 8, 4}
    assert len(sizes) > 1
    assert int((buffer.finish == Finish.STOP).sum()) > 16
    kept = rollout(policy, env, compact=False)
    assert kept.loop is not None
    assert set(kept.loop._stages) == {32}
    assert_same_rollout(kept, buffer)


def test_stop_strings_are_found_between_steps(taped: None) -> None:
    policy, env = twin(random_model("LlamaConfig"), stop=("d",))
    buffer = rollout(policy, env)
    policy.lm.capture = False
    assert_same_rollout(buffer, rollout(policy, env))


def test_who_is_refused(taped: None) -> None:
    policy, env = twin(random_model("LlamaConfig"))
    assert cuda_graph.unsupported_reason(policy, env) is None
    assert cuda_graph.unsupported_reason(policy.truncated(top_k=2), env) == "sampling is truncated"
    policy.lm.fast = False
    assert "transformers" in str(cuda_graph.unsupported_reason(policy, env))
    policy.lm.capture = False
    assert cuda_graph.unsupported_reason(policy, env) == "capture is off"


def test_a_cpu_captures_nothing() -> None:
    policy, env = twin(random_model("LlamaConfig"))
    assert "the device has no CUDA graphs" in str(cuda_graph.unsupported_reason(policy, env))
    calls: list[int] = []
    captured = CapturedStep(lambda: calls.append(1), torch.device("cpu"))
    for _ in range(5):
        captured()
    assert len(calls) == 5


# On a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arguments", SETTINGS)
@pytest.mark.parametrize("config", ["GPT2Config", "LlamaConfig"])
def test_captured_is_eager(config: str, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    """Three rollouts with changing weights, replayed from one capture, against the ordinary loop on the same device.

    In bfloat16 another order of adding moves a border now and then, and a row goes another way from there.
    """
    lm = random_model(config, **FUSED[config]).to("cuda", dtype)
    policy, env = twin(lm, **arguments)
    buffer = RolloutBuffer.like(env)
    buffer.loop = loop = CapturedLoop(policy, env, buffer)
    for update in range(3):
        perturb(lm.adapters.parameters("policy"), seed=update, std=0.05)
        collect(policy, env, buffer, Stream(3, update))
        lm.capture = False
        ordinary = collect(policy, env, RolloutBuffer.like(env), Stream(3, update))
        lm.capture = True
        same = (buffer.tokens == ordinary.tokens).all(1)
        assert float(same.float().mean()) > (0.95 if dtype == torch.float32 else 0.5)
        close = 1e-4 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(buffer.logp[same], ordinary.logp[same], atol=close, rtol=close)
    assert buffer.loop is loop
    assert loop._stages[32].step.graph is not None, "the step was captured"


@pytest.mark.gpu
def test_a_captured_step_waits_for_nothing() -> None:
    lm = random_model("LlamaConfig").to("cuda")
    policy, env = twin(lm, min_new_tokens=12)
    buffer = rollout(policy, env)
    loop = buffer.loop
    assert loop is not None
    env.reset(seed=0)
    with torch.inference_mode():
        loop.begin(policy.start(*env.prompt_block()), torch.rand(32, 12, device="cuda"))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
