"""What differs between a CPU and a GPU: who waits for whom, how numbers get there, and how exactly they are multiplied.

A GPU works behind the host's back. Looking at a number makes the host wait until everything before it is done, so
nothing that runs once a token looks, and what is sent goes from pinned memory without waiting.

Precision. float32 is float32: TF32, which rounds the factors of a product to ten bits, stays off, as torch has it.
`torch.set_float32_matmul_precision("high")` switches it on; a rollout's log-probabilities are then computed again in
the training pass, as they are in bfloat16 (`rounds`). bfloat16 weights are cast once, at loading; adapters,
value heads, logits and log-probabilities are float32 whatever the model's dtype.
"""

import torch
from torch import Tensor


def free_to_look(device: torch.device) -> bool:
    """Whether looking at a tensor's numbers waits for nobody."""
    return device.type == "cpu"


def can_capture(device: torch.device) -> bool:
    """Whether the operations of a decoding step can be captured once, and replayed without the host."""
    return device.type == "cuda"


def rounds(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype are computed with fewer bits than float32 has."""
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return dtype != torch.float32 or tf32


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A copy of a CPU tensor on a device. The host does not wait for it: it is read from pinned memory."""
    if device.type == "cpu":
        return x
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
