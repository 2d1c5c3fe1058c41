"""Packed weights against plain ones. test_fast.py tests that changed weights are packed again."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import random_model
from test_fast import FUSED, assert_same_rollout, made, rollout

from lmgym.fused import PackedLinear, can_pack, onednn, pack_linear

CPU = torch.device("cpu")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(CPU, dtype)]
pytestmark = pytest.mark.skipif(torch.float32 not in DTYPES, reason="this build of torch packs nothing")


@pytest.fixture
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Weights of every size are packed."""
    monkeypatch.setattr(onednn, "SMALL", 0)
    yield
    can_pack.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_product_is_a_product(small_ones_too: None, dtype: torch.dtype, rows: Any, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    weight, x, residual = draw(20, 12), draw(*rows, 12), draw(*rows, 20)
    added = draw(20) if bias else None
    product = pack_linear(weight, added)
    assert product is not None
    plain = x.double() @ weight.double().T + (0 if added is None else added.double())
    close: Any = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    before = residual.clone()
    torch.testing.assert_close(product(x).double(), plain, **close)
    torch.testing.assert_close(product(x, residual).double(), plain + residual.double(), **close)
    assert torch.equal(residual, before), "the residual is not overwritten"


@pytest.mark.parametrize("config", FUSED)
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_a_rollout_with_packed_weights_is_that_without(
    small_ones_too: None, config: str, targets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = random_model(config, **FUSED[config])
    policy, env = made(lm, targets=targets)
    one = rollout(policy, env)
    fused = lm.fused("policy")
    assert fused is not None
    assert all(
        isinstance(p, PackedLinear)
        for la in fused.weights.layers("policy", decode=True)
        for p in (la.qkv, la.up, la.down)
    )
    assert lm.output_head(1.0).packed is not None
    for place in ("fused.weights", "fused.forward", "models.language_model"):
        monkeypatch.setattr(f"lmgym.{place}.pack_linear", lambda *_: None, raising=False)
    other_lm = random_model(config, **FUSED[config])
    assert other_lm.output_head(1.0).packed is None
    assert_same_rollout(one, rollout(*made(other_lm, targets=targets)))


def test_what_torch_cannot_pack_is_left_as_it_is(small_ones_too: None, monkeypatch: pytest.MonkeyPatch) -> None:
    can_pack.cache_clear()
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert pack_linear(torch.ones(4, 4), None) is None
    can_pack.cache_clear()
    monkeypatch.undo()
    assert pack_linear(torch.ones(400, 400, dtype=torch.float64), None) is None
    assert pack_linear(torch.ones(400, 400, device="meta"), None) is None
    assert pack_linear(torch.ones(400, 400), None) is not None
    assert pack_linear(torch.ones(40, 40), None) is None, "too small to be packed"
