"""Weights packed once into the layout of a CPU's kernels, for the many small matrix products of decoding.

A product of 64 rows with a matrix of a million numbers spends a third of its time on reordering the matrix for the
kernel, and a decoding loop computes the same product for every token. oneDNN can reorder ("pack") the matrix
beforehand. torch offers this as internal operations, which its compiler uses for frozen models. If they are missing, or
the processor has no instructions for bfloat16, nothing is packed.
"""

from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SMALL = 1 << 17
"""Float32 matrices of at most this many numbers are not packed: they stay in the innermost cache anyway."""


class PackedLinear(NamedTuple):
    """`x Wᵀ + b` with W packed, without a gradient.

    Attributes:
        weight: [out, in] in a layout that only oneDNN can read.
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
    """A projection with its weight packed; None if that is impossible or not faster."""
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
