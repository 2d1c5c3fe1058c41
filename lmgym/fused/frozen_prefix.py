"""The output of the layers below the lowest adapted one: they are frozen, so it is computed once per rollout."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from lmgym.fused.forward import FusedModel


class FrozenPrefix(NamedTuple):
    """The output of a model's lowest layers for some texts, computed once and used by all later passes over them.

    It is valid for these texts alone: sequences with other tokens need another one, or None.

    Attributes:
        hidden: [B, L, D] the output; column c holds position c.
        layers: how many of the lowest layers computed it.
        owner: the model that these layers belong to; other models do not use it.
    """

    hidden: Float[Tensor, "B L D"]
    layers: int
    owner: FusedModel
