"""Set up before anything is imported: no network, one thread a process, and run-time checks of every annotation."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest
import torch

# Before lmgym and agents are imported: the hook rewrites a module while it loads. See test_typing_hook.py.
jaxtyping.install_import_hook(["lmgym", "agents"], "beartype.beartype")

torch.set_num_threads(1)  # the tests run in several processes; more threads would fight over the cores

if TYPE_CHECKING:
    from lmgym import LanguageModel

SLOW_TIMEOUT = 1800.0
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is none; give `slow` tests that set no timeout of their own a longer one."""
    no_gpu = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `../shared/data` beside the repository: a real small model, real stories, real preferences."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder ../shared/data beside the repository: this test reads the real data that lies there")
    return SHARED_DATA


@pytest.fixture
def probe() -> "LanguageModel":
    """A random Llama over the letters a to d, pad 0 and eos 1: rotary positions."""
    import lmgym

    return lmgym.load("probe")


@pytest.fixture
def gpt2() -> "LanguageModel":
    """A random GPT-2 with the probe's tokenizer and dropout in its config: absolute positions."""
    return random_gpt2()


def random_gpt2(positions: int = 24, seed: int = 0) -> "LanguageModel":
    from transformers import GPT2Config, GPT2LMHeadModel

    import lmgym

    config = GPT2Config(
        vocab_size=6, n_positions=positions, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3,
        resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    return lmgym.LanguageModel(model.train(), lmgym.load("probe").tokenizer, "gpt2")
