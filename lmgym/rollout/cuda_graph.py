"""Decoding with CUDA graphs: every step runs the same operations on the same memory.

On a GPU, the speed of a small model is limited by the host: a step of GPT-2 is about two hundred operations, and
launching each takes longer than running it. Here a step (attention, head, sampling, appending) is captured once and
replayed. The number of the step is in a tensor, attention reads all columns of the cache and masks the empty ones, and
no value is read on the host. Without capture, on any device, the steps give the same result as the ordinary loop.
"""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmgym.devices import can_capture
from lmgym.env import TokenVectorEnv
from lmgym.models import Decoding, FusedDecoding
from lmgym.policy import Policy, TokenPolicy
from lmgym.rollout.buffer import RolloutBuffer

WARM_UP = 3
"""Steps that run uncaptured, on a separate stream, before the capture, so that libraries can initialise."""
HALVINGS = 3
"""How often the batch may be halved when rows have ended. Each size has its own graph and cache."""


def unsupported_reason(policy: TokenPolicy, env: TokenVectorEnv) -> str | None:
    """Why a rollout cannot be decoded in captured steps, or None if it can."""
    if not can_capture(env.model.device):
        return "the device has no CUDA graphs"
    if not isinstance(policy, Policy):
        return "the policy is not an lmgym.Policy"
    if not policy.lm.capture:
        return "capture is off"
    if policy.truncates:
        return "sampling is truncated"
    if env.state.reads_text:
        return "the action mask depends on the text"
    adapters = (policy.adapter, *(["value"] if policy.critic == "adapter" else []))
    return None if all(policy.lm.fused(a) for a in adapters) else "the model's passes go through transformers"


class CapturedStep:
    """A function without arguments on static tensors, which is captured in a CUDA graph and replayed.

    The first calls run it directly. On a device without CUDA graphs, all calls do.
    """

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.function = function
        self.left = WARM_UP if can_capture(device) else -1
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.left > 0:
            self.left -= 1
            here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self.function()
            here.wait_stream(aside)
        elif self.left == 0:
            self._capture()
        else:
            self.function()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.function()
        except RuntimeError as error:
            self.left = -1
            warnings.warn(
                f"the decoding step could not be captured in a CUDA graph, and runs as it is, slower ({error}): "
                "lm.capture = False keeps to the ordinary loop",
                stacklevel=2,
            )
            self.function()
            return
        self.graph = graph
        graph.replay()


class _Stage:
    """The captured step for one batch size.

    Attributes:
        rows: [R] rows of the environment.
        decoding: their KV cache.
        step: chooses and reads one token in each row.
    """

    def __init__(self, loop: "CapturedLoop", decoding: FusedDecoding, count: int):
        columns = loop.env.max_prompt_tokens + loop.env.max_new_tokens
        columns += -columns % 8  # attention kernels want masks that are aligned
        self.rows = torch.zeros(count, dtype=torch.long, device=loop.at.device)
        self.decoding = decoding.empty_static(count, columns)
        if isinstance(decoding.critic, FusedDecoding):
            self.decoding.critic = decoding.critic.empty_static(count, columns)
        self.step = CapturedStep(lambda: loop.take(self), loop.at.device)

    def fill(self, decoding: Decoding, places: Tensor) -> None:
        """Copies these rows of a decoding into the static cache."""
        for own, other in zip(self.decoding.parts, decoding.parts, strict=True):
            assert isinstance(own, FusedDecoding)
            assert isinstance(other, FusedDecoding)
            own.copy_rows(other, places)


class CapturedLoop:
    """Decodes rollouts into one buffer, step by step. The graphs are reused by all rollouts into that buffer.

    Args:
        policy: one that `unsupported_reason` accepts.
        env: B rows.
        buffer: for B rows.
    """

    def __init__(self, policy: Policy, env: TokenVectorEnv, buffer: RolloutBuffer):
        self.policy, self.env, self.buffer = policy, env, buffer
        self.uniforms = torch.zeros(env.num_envs, env.max_new_tokens, device=policy.device)
        self.at = torch.zeros(1, dtype=torch.long, device=policy.device)
        self._stages: dict[int, _Stage] = {}
        self._addresses: list[int] = []

    @property
    def rows(self) -> Int[Tensor, " R"]:
        """The rows of the environment in the current batch."""
        return self._stage.rows

    @property
    def decoding(self) -> FusedDecoding:
        """Their KV cache."""
        return self._stage.decoding

    def begin(self, decoding: Decoding, uniforms: Float[Tensor, "B T"]) -> None:
        """Starts from the decoding of the prompts."""
        assert isinstance(decoding, FusedDecoding)
        modules = (self.policy.lm.model, self.policy.value_head)
        addresses = [p.data_ptr() for module in modules for p in module.parameters()]
        if addresses != self._addresses:  # the weights were moved, or the model has other adapters
            self._stages, self._addresses = {}, addresses
        self.env.make_append_static()
        self.uniforms.copy_(uniforms)
        self.at.zero_()
        everyone = torch.arange(self.env.num_envs, device=self.at.device)
        self._enter(decoding, everyone, everyone)

    def step(self) -> None:
        """Chooses and reads one token in each row."""
        self._stage.step()
        for part in self.decoding.parts:
            assert isinstance(part, FusedDecoding)
            part.cache.longest += 1  # a replay does not run the host's counting
            self.policy.lm.passes.add(len(self.rows))

    def leave(self, running: list[int]) -> bool:
        """Continues with a half or a quarter of the rows, if so few are running; ended rows fill the batch up.

        Returns:
            Whether any rows left.
        """
        held, size = self.rows.tolist(), self.env.num_envs
        least = size >> HALVINGS
        while size // 2 >= max(least, len(running), 1):
            size //= 2
        if size >= len(held):
            return False
        going = set(running)
        places = [i for i, row in enumerate(held) if row in going] + [i for i, r in enumerate(held) if r not in going]
        index = torch.tensor(sorted(places[:size]), device=self.at.device)
        self._enter(self.decoding, index, self.rows[index])
        return True

    def take(self, stage: _Stage) -> None:
        """One step: the same operations on the same memory every time."""
        at, rows = self.at, stage.rows
        allowed = self.env.action_mask_table.index_select(0, at)[0]
        action = self.policy.act(stage.decoding, self.uniforms[rows, at], allowed)
        self.buffer.logp[rows, at] = action.logp
        self.buffer.values[rows, at] = action.value
        self.env.append(action.token, rows)
        self.policy.advance(stage.decoding, action.token)
        at.add_(1)

    def _enter(self, decoding: FusedDecoding, places: Tensor, rows: Tensor) -> None:
        stage = self._stages.get(len(rows)) or _Stage(self, decoding, len(rows))
        self._stages[len(rows)] = self._stage = stage
        stage.rows.copy_(rows)
        stage.fill(decoding, places)
