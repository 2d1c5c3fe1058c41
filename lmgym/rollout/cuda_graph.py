"""Decoding in steps that are all the same, on tensors that never move: so that a CUDA graph can repeat them.

On a GPU a small model is waiting for the host: a step of GPT-2 is some two hundred operations, and each takes longer to
ask for than to do. Here a step (attention, head, drawing, the environment's appending) asks for the same operations on
the same memory every time. Which step it is stands in a tensor, attention looks at all columns that there will ever be
and masks those that are not filled, and nothing is looked at. So it is captured once and replayed. Run as it is, on any
device, it does what `lmgym.rollout` does otherwise.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmgym.devices import can_capture
from lmgym.env import TokenVectorEnv
from lmgym.models import Decoding, FusedDecoding
from lmgym.policy import Policy, TokenPolicy

if TYPE_CHECKING:
    from lmgym.rollout.buffer import RolloutBuffer

WARM_UP = 3
"""Steps that are run as they are, on a stream of their own, before one is captured: libraries set themselves up."""
HALVINGS = 3
"""How often the rows may be halved when others have ended. Each size is captured by itself, and has a cache."""


def unsupported_reason(policy: TokenPolicy, env: TokenVectorEnv) -> str | None:
    """Why a rollout is not decoded in captured steps, or None."""
    if not can_capture(env.model.device):
        return "the device captures nothing"
    if not isinstance(policy, Policy):
        return "the policy is not one over a language model"
    if not policy.lm.capture:
        return "capture is off"
    if policy.truncates:
        return "sampling is truncated"
    adapters = (policy.adapter, *(["value"] if policy.critic == "adapter" else []))
    return None if all(policy.lm.fused(a) for a in adapters) else "the model's passes go through transformers"


class CapturedStep:
    """A function without arguments over tensors that stay where they are: captured in a CUDA graph, and replayed.

    The first calls run it as it is. On a device without graphs all do.
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
    """Some rows of the environment, and where their decoding stands.

    Attributes:
        rows: [R] which.
        decoding: of R rows.
        step: takes one.
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
        """Takes over these rows of a decoding."""
        for own, other in zip(self.decoding.parts, decoding.parts, strict=True):
            assert isinstance(own, FusedDecoding)
            assert isinstance(other, FusedDecoding)
            own.copy_rows(other, places)


class CapturedLoop:
    """The decoding of rollouts into one buffer, step by step; what was captured serves all rollouts into it.

    Args:
        policy: one that `unsupported_reason` accepts.
        env: B rows.
        buffer: for B rows.
    """

    def __init__(self, policy: Policy, env: TokenVectorEnv, buffer: "RolloutBuffer"):
        self.policy, self.env, self.buffer = policy, env, buffer
        self.uniforms = torch.zeros(env.num_envs, env.max_new_tokens, device=policy.device)
        self.at = torch.zeros(1, dtype=torch.long, device=policy.device)
        self._stages: dict[int, _Stage] = {}
        self._addresses: list[int] = []

    @property
    def rows(self) -> Int[Tensor, " R"]:
        """The environment's rows that are decoded."""
        return self._stage.rows

    @property
    def decoding(self) -> FusedDecoding:
        """Where their decoding stands."""
        return self._stage.decoding

    def begin(self, decoding: Decoding, uniforms: Float[Tensor, "B T"]) -> None:
        """Starts from prompts that have been read."""
        assert isinstance(decoding, FusedDecoding)
        modules = (self.policy.lm.model, self.policy.value_head)
        addresses = [p.data_ptr() for module in modules for p in module.parameters()]
        if addresses != self._addresses:  # the model went elsewhere, or has other adapters
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
            part.cache.longest += 1  # a replay runs none of the host's counting

    def leave(self, running: list[int]) -> bool:
        """Goes on with half of the rows, or a quarter, where so few run; those that fill it up have ended.

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
        """The step itself: the same operations on the same memory, whichever step it is."""
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
