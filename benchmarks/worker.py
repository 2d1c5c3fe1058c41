"""Both ends of the connection between the benchmark and a contender, which runs in its own process.

The benchmark writes a job, then orders, one JSON object per line; the contender answers each with one line. Therefore
contenders can have their own virtual environments, keep their state between rounds, and never work at the same time.
This module imports only torch and safetensors, so that it runs in the environment of a peer.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Outputs = Callable[[], Mapping[str, Tensor]]
PAD, EOS = 0, 1
"""Token ids of every shape."""
LR, BETA = 1e-5, 0.05
"""Every contender's learning rate, so low that the policy hardly changes, and its KL penalty."""


@dataclass(frozen=True)
class Job:
    """The work that a contender repeats every turn.

    Attributes:
        folder: of the shape: `policy`, `adapter`, `reward` and `prompts.json`.
        dtype: of the weights.
        device: "cpu" or "cuda".
        rows: completions of a rollout.
        new_tokens: maximum number of tokens of a completion.
        micro_rows: completions that an update holds in memory at the same time.
        epochs: passes over a rollout.
        ends: whether completions end at the end-of-sequence token.
        options: the contender's own.
    """

    folder: str
    dtype: str = "float32"
    device: str = "cpu"
    rows: int = 64
    new_tokens: int = 48
    micro_rows: int = 64
    epochs: int = 4
    ends: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def part(self, name: str) -> str:
        """The folder of the policy, the adapter or the reward model."""
        return str(Path(self.folder) / name)

    def prompts(self) -> list[list[int]]:
        """Token ids."""
        return json.loads((Path(self.folder) / "prompts.json").read_text())

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Turn:
    """The contender's end: waits for its turn, and reports what it did and how long it took."""

    def __init__(self) -> None:
        # Output that libraries print goes to the log, not into the connection.
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._imported = resident()
        self._outputs: Outputs = dict
        self._began = 0.0
        self.device = "cpu"

    def job(self) -> Job:
        """Reads the job."""
        job = Job(**json.loads(sys.stdin.readline()))
        self.device = job.device
        return job

    def ready(self) -> None:
        """Reports that everything is loaded; returns when the first turn begins."""
        self._wait({"ready": True, "versions": _versions()})

    def done(self, phases: Mapping[str, float] | None = None, outputs: Outputs = dict, times: float = 1.0) -> None:
        """Reports that the work of a turn is done; returns when the next turn begins.

        Args:
            phases: seconds of its parts.
            outputs: returns what to check: `tokens` [B, T], `is_action` [B, T], and `logp`, `reference_logp`, `score`
                if the contender has them.
            times: multiplies the seconds, for a contender that does only a share of the work.
        """
        seconds = (self.clock() - self._began) * times
        self._outputs = outputs
        self._wait({"seconds": seconds, "phases": dict(phases or {})})

    def clock(self) -> float:
        """Seconds, after all work queued on the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def _wait(self, answer: Mapping[str, Any]) -> None:
        self._say(answer)
        for line in sys.stdin:
            order = json.loads(line)
            if order["do"] == "run":
                self._began = self.clock()
                return
            if order["do"] == "save":
                save_file({name: x.detach().cpu().contiguous() for name, x in self._outputs().items()}, order["path"])
                self._forget()
                self._say({})
            elif order["do"] == "stop":
                self._say({"peak_mb": self._peak()})
                break
        raise SystemExit

    def _forget(self) -> None:
        """Frees the checked tensors, and resets the peak memory: checking is not part of the work."""
        self._outputs = dict
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> float:
        """Peak memory in megabytes, minus that after the imports; on a GPU, of the GPU's memory."""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return peak_resident() - self._imported

    def _say(self, answer: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()


def resident() -> float:
    """The current memory of the process, in megabytes."""
    return _status("VmRSS")


def peak_resident() -> float:
    """The peak memory of the process, in megabytes."""
    return _status("VmHWM")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024 / 1e6


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "peft", "trl", "agilerl", "stable_baselines3")
    return {name: version(name) for name in packages if name in sys.modules}


class Worker:
    """The benchmark's end of the connection.

    Args:
        command: starts the contender.
        job: its work.
        log: the file for its standard error.
        environment: its environment variables.
        folder: its working directory.

    Raises:
        RuntimeError: it ended before it was ready.
    """

    def __init__(self, command: list[str], job: Job, log: Path, environment: Mapping[str, str], folder: Path):
        self.command, self.log = command, log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), env=dict(environment),
            cwd=folder, text=True,
        )  # fmt: skip
        self._tell(asdict(job))

    def ready(self) -> dict[str, Any]:
        """Waits until everything is loaded; returns the versions of the packages that it uses."""
        return self._answer()["versions"]

    def run(self) -> dict[str, Any]:
        """One turn: `seconds` and `phases`."""
        self._tell({"do": "run"})
        return self._answer()

    def save(self, path: Path) -> None:
        """Writes the outputs of the last turn."""
        self._tell({"do": "save", "path": str(path)})
        self._answer()

    def stop(self) -> float:
        """Ends the process; returns its peak memory in megabytes."""
        self._tell({"do": "stop"})
        peak = self._answer()["peak_mb"]
        self._process.wait()
        return peak

    def kill(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()

    def _tell(self, order: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RuntimeError(f"{' '.join(self.command)} ended with code {self._process.wait()}:\n{tail}")
        return json.loads(line)
