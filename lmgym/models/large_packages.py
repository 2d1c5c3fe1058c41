"""Packages that take seconds to import, imported when one of their names is first used.

peft and the modelling code of transformers double the time until a command can begin, and only a model that is loaded
needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _LazyModule:
    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


if TYPE_CHECKING:
    import peft
    from peft.tuners import tuners_utils
    from transformers import modeling_layers
else:
    peft = _LazyModule("peft")
    tuners_utils = _LazyModule("peft.tuners.tuners_utils")
    modeling_layers = _LazyModule("transformers.modeling_layers")

__all__ = ["modeling_layers", "peft", "tuners_utils"]
