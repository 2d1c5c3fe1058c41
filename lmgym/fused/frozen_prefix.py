"""What the layers below the lowest adapted layer compute: frozen, so computed once per rollout."""

from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Float
from torch import Tensor

from lmgym.fused.forward import Trunk

if TYPE_CHECKING:
    pass


class FrozenPrefix(NamedTuple):
    """What the layers below the adapters make of texts, computed once for all passes above it.

    It belongs to these texts: sequences with other tokens need another one, or None.

    Attributes:
        hidden: [B, L, D] what goes into layer `layer`; column c holds position c.
        layer: the lowest layer that an adapter changes.
        owner: whose layers these are; others compute their own.
    """

    hidden: Float[Tensor, "B L D"]
    layer: int
    owner: Trunk
