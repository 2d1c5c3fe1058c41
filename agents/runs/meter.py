"""What each stage of a run costs: seconds, processor seconds, peak memory, and the same for every step."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from agents.training import Stateful


@dataclass
class Loop:
    """The steps of one loop of a stage.

    Attributes:
        seconds: of each step.
        processor_seconds: of each step, of all threads of this process.
        tokens: tokens per completion of each step; 0 where they are not measured.
    """

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def add(self, seconds: float, processor_seconds: float, tokens: float) -> None:
        """One more step."""
        self.seconds.append(seconds)
        self.processor_seconds.append(processor_seconds)
        self.tokens.append(tokens)


@dataclass
class StageCost:
    """What a stage took.

    Attributes:
        seconds: by the run's clock.
        processor_seconds: of all threads of this process.
        peak_mb: peak memory in megabytes above that of the process before it loaded anything; None: unknown.
        loops: its steps, by the name of the loop.
    """

    seconds: float
    processor_seconds: float
    peak_mb: float | None
    loops: dict[str, Loop] = field(default_factory=dict)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "StageCost":
        """The inverse of `as_data`."""
        loops = {name: Loop(**loop) for name, loop in data["loops"].items()}
        return cls(data["seconds"], data["processor_seconds"], data["peak_mb"], loops)

    def as_data(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Meter:
    """Measures the stages of a run, one after another.

    Args:
        device: where the models are: on a GPU, its memory is measured, otherwise that of the process.
        base_mb: memory of the process before it loaded anything.
        clock: the run's clock.

    Attributes:
        stages: what each stage that has ended cost.
        checkpoint_mb: size of the tensors of its largest checkpoint, in megabytes.
    """

    def __init__(self, device: torch.device, base_mb: float | None, clock: Callable[[], float] = time.perf_counter):
        self.device, self.base_mb, self.clock = device, base_mb, clock
        self.stages: dict[str, StageCost] = {}
        self.checkpoint_mb = 0.0
        self._loops: dict[str, Loop] = {}
        self._began = self._step = (clock(), time.process_time())
        self._highest: float | None = None
        self._forget()

    def enter(self) -> None:
        """A loop begins."""
        self._step = (self.clock(), time.process_time())

    def leave(self, stateful: Mapping[str, Stateful]) -> None:
        """A loop has ended; `stateful` is what its checkpoints hold."""
        states = [state for part in stateful.values() for state in [part.state()]]
        size = sum(tensor.nbytes for state in states for tensor in state.tensors.values())
        self.checkpoint_mb = max(self.checkpoint_mb, size / 1e6)

    def step(self, loop: str, done: int, total: int | None, metrics: Mapping[str, float]) -> None:
        """A step of a loop has ended.

        Args:
            loop: its name.
            done: steps of the loop until now.
            total: steps of the whole loop, where they are known.
            metrics: what the step measured.
        """
        now = (self.clock(), time.process_time())
        found = self._loops.setdefault(loop, Loop())
        found.add(now[0] - self._step[0], now[1] - self._step[1], float(metrics.get("tokens/mean", 0.0)))
        self._step = now

    def end(self, stage: str) -> None:
        """A stage has ended; what follows belongs to the next one."""
        now = (self.clock(), time.process_time())
        self.stages[stage] = StageCost(now[0] - self._began[0], now[1] - self._began[1], self._peak(), self._loops)
        self._loops, self._began = {}, now
        self._forget()

    @property
    def highest_mb(self) -> float | None:
        """Peak memory until now, as `StageCost.peak_mb`."""
        found = [mb for mb in (self._highest, self._peak()) if mb is not None]
        return max(found, default=None)

    @property
    def highest_bytes(self) -> float:
        """Peak memory until now, on a CPU with that of Python and its libraries; 0: unknown."""
        base = 0.0 if self.device.type == "cuda" else self.base_mb or 0.0
        return 1e6 * (base + self.highest_mb) if self.highest_mb is not None else 0.0

    def _peak(self) -> float | None:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        peak = memory_of_process("VmHWM")
        return None if peak is None or self.base_mb is None else peak - self.base_mb

    def _forget(self) -> None:
        """Lets the peak begin anew."""
        self._highest = self.highest_mb
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with suppress(OSError):  # where the system does not allow it, a stage's peak is that of the run until then
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_of_process(key: str = "VmRSS") -> float | None:
    """Memory of this process in megabytes: "VmRSS", now, or "VmHWM", its peak. None on systems other than Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{key}:")), None)
