"""Differences between a CPU and a GPU: host synchronisation, transfers and the precision of matrix products.

A GPU runs asynchronously. To read a tensor's value on the host, the host has to wait until all earlier work is done.
So code that runs once per token never reads a value, and tensors are sent from pinned memory without waiting.

Precision. float32 is exact float32: TF32, which rounds the factors of a product to ten bits, stays off, as by default
in torch. `torch.set_float32_matmul_precision("high")` switches it on. A rollout's log-probabilities are then computed
again in the training pass, as they are in bfloat16 (`reduced_precision`). bfloat16 weights are cast once, at loading;
adapters, value heads, logits and log-probabilities are float32 whatever the model's dtype.
"""

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
