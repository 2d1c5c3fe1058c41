"""Weights laid out once as a CPU's kernels read them, for the many small products of decoding.

A product of 64 rows with a matrix of a million numbers spends a third of its time on bringing the matrix into the order
that the kernel reads, and a decoding loop asks for the same product at every token. oneDNN lets the matrix be packed
beforehand. torch has it under names of its own, which its compiler uses for frozen models; where they are missing, or
the processor has no instructions for bfloat16, nothing is packed.
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 1 << 17
"""Numbers of a float32 matrix up to which packing it is no gain: it stays in the cache nearest to the core."""


class PackedLinear(NamedTuple):
    """`x Wᵀ + b` with W packed, without a gradient.

    Attributes:
        weight: [out, in] in a layout that only oneDNN reads.
        bias: [out] or None.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None

    def __call__(self, x: Float[Tensor, "*rows in"], residual: Tensor | None = None) -> Float[Tensor, "*rows out"]:
        flat = x.flatten(0, -2)
        if residual is None:
            y = torch.ops.mkldnn._linear_pointwise(flat, self.weight, self.bias, "none", [], "")
        else:
            rest = residual.flatten(0, -2)
            y = torch.ops.mkldnn._linear_pointwise.binary(flat, rest, self.weight, self.bias, "add")
        return y if x.ndim == 2 else y.unflatten(0, x.shape[:-1])

    def add_to(self, x: Float[Tensor, "N out"], inner: Float[Tensor, "N in"]) -> Float[Tensor, "N out"]:
        """`x + inner Wᵀ + b`."""
        return self(inner, x)


def pack_linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> PackedLinear | None:
    """A projection with its weight packed; None where that cannot be, or does not pay."""
    if not can_pack(weight.device, weight.dtype) or (weight.dtype == torch.float32 and weight.numel() <= SMALL):
        return None
    return PackedLinear(torch.ops.mkldnn._reorder_linear_weight(weight.detach()), bias)


@cache
def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch and the processor can multiply packed matrices of a dtype."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
