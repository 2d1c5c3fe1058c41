"""Differences between a CPU and a GPU: host synchronisation, transfers, precision of matrix products, memory.

A GPU runs asynchronously. To read a tensor's value on the host, the host has to wait until all earlier work is done.
So code that runs once per token never reads a value, and tensors are sent from pinned memory without waiting.

Precision. float32 is exact float32: TF32, which rounds the factors of a product to ten bits, stays off, as by default
in torch. `torch.set_float32_matmul_precision("high")` switches it on. A rollout's log-probabilities are then computed
again in the training pass, as they are in bfloat16 (`reduced_precision`). bfloat16 weights are cast once, at loading;
adapters, value heads, logits and log-probabilities are float32 whatever the model's dtype.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def host_reads_are_free(device: torch.device) -> bool:
    """Whether reading a tensor's values on the host needs no synchronisation."""
    return device.type == "cpu"


def can_capture(device: torch.device) -> bool:
    """Whether the operations of a decoding step can be captured once, and replayed without the host."""
    return device.type == "cuda"


def reduced_precision(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether matrix products of this dtype are computed with less precision than exact float32."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return dtype != torch.float32 or tf32


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a CPU tensor to a device; a GPU copies from pinned memory, so that the host does not wait."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def total_memory(device: torch.device) -> int:
    """All memory of a GPU, in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


def free_memory(device: torch.device, root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated on a device; None if the system does not tell (on a CPU: other than Linux).

    On a CPU it is what the system can give without swapping, or what the control group (container) of the process has
    left, if that is less. Pages that are only a cache of files count as free.

    Args:
        device: the device.
        root: where the file systems `proc` and `sys` are.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    found = [1024 * n for n in _numbers(root / "proc/meminfo", "MemAvailable:")]
    groups = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, usage in groups:
        folder = (root / "sys/fs/cgroup" / limit).parent
        most, used = _numbers(root / "sys/fs/cgroup" / limit), _numbers(root / "sys/fs/cgroup" / usage)
        if most and used:
            found.append(most[0] - used[0] + sum(_numbers(folder / "memory.stat", "inactive_file ")))
    return max(0, min(found)) if found else None


def _numbers(path: Path, start: str = "") -> list[int]:
    """The first number of each line that begins with `start`; empty if there is no such file or number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    words = [line.removeprefix(start).split()[0] for line in lines if line.startswith(start) and line != start]
    return [int(word) for word in words if word.isdigit()]


def return_freed_memory() -> None:
    """Gives freed memory of the host back to the system, where the C library keeps it otherwise (glibc).

    A rollout's merged weights and cache are many allocations of a few megabytes each. glibc keeps their memory for
    later allocations, and training, which allocates other sizes, cannot use all of it.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # not a system with such libraries
        return None
