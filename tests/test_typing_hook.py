"""The annotations are checked while the tests run: the other tests rely on it."""

import importlib
import os
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from lmgym.reward import kl_reward

pytestmark = pytest.mark.skipif("JAXTYPING_DISABLE" in os.environ, reason="annotations are not checked now")


def test_a_wrong_shape_raises() -> None:
    """Two shapes that must agree and don't; the function itself, with `kl="none"`, would not notice."""
    with pytest.raises(TypeCheckError):
        kl_reward("none", 0.1, torch.zeros(2), torch.zeros(3))


def test_a_right_shape_does_not() -> None:
    assert kl_reward("none", 0.1, torch.zeros(3), torch.zeros(3)).shape == (3,)


@pytest.mark.parametrize("package", ["lmgym", "agents"])
def test_every_module_was_loaded_through_the_hook(package: str) -> None:
    importlib.import_module(package)
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package and (spec := module.__spec__) is not None:
            assert type(spec.loader).__module__.startswith("jaxtyping"), f"{name} was imported before conftest.py"
