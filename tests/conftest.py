"""Set up before anything is imported: no network, one thread a process, and run-time checks of every annotation."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jaxtyping
import pytest
import torch
from hypothesis import settings

# The same examples every time, and no folder of examples beside the tests: what fails, fails for everybody.
settings.register_profile("lmgym", derandomize=True, database=None, deadline=None)
settings.load_profile("lmgym")

torch.set_num_threads(1)  # the tests run in several processes; more threads would fight over the cores

if TYPE_CHECKING:
    from collections.abc import Callable

    from lmgym import LanguageModel
    from lmgym.preferences import LabelStore

SLOW_TIMEOUT = 1800.0
UNCHECKED = bool(os.environ.get("JAXTYPING_DISABLE"))
"""Set by tests/mutants.py: the planted bugs are not for annotations to catch."""
WHOLE_RUNS = {
    "test_algorithms", "test_benchmark", "test_benchmark_results", "test_chat_cli", "test_cli", "test_comparison",
    "test_examples", "test_gymnasium", "test_plugins", "test_ppo", "test_saved_runs", "test_sb3", "test_studies",
    "test_survival", "test_testing",
}  # fmt: skip
"""Modules that train. Annotations are not checked in them: it costs a third of their time, and other tests call the
same functions."""
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Turn the checks of annotations on, but for `pytest -m stress`, which is to meet what users meet, and `-m slow`.

    They take as long as training itself.
    """
    # Before lmgym and agents are imported: the hook rewrites a module while it loads. See test_typing_hook.py.
    if not str(config.getoption("markexpr")).startswith(("slow", "stress")) and not UNCHECKED:
        jaxtyping.install_import_hook(["lmgym", "agents"], "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check annotations in this test, unless its module trains whole runs."""
    jaxtyping.config.update("jaxtyping_disable", UNCHECKED or item.path.stem in WHOLE_RUNS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is none, and `stress` tests where annotations are checked, which users do not have.

    `slow` tests that set no timeout of their own get a longer one.
    """
    no_gpu = pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False")
    checked = pytest.mark.skip(reason="the tests' type checks are on: run stress tests by `pytest -m stress` alone")
    has_gpu = torch.cuda.is_available()
    for item in items:
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(no_gpu)
        if item.get_closest_marker("stress") and not str(item.config.getoption("markexpr")).startswith("stress"):
            item.add_marker(checked)
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT))


def slow(*values: Any) -> Any:
    """A case of `pytest.mark.parametrize` that only `pytest -m slow` runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


def full(*values: Any) -> Any:
    """A slow case that CI leaves out, because another one shows the same in less time; `make full` runs it."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.full])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `../shared/data` beside the repository: a real small model, real stories, real preferences."""
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder ../shared/data beside the repository: this test reads the real data that lies there")
    return SHARED_DATA


@pytest.fixture
def clock() -> Any:
    """The clock of the stores of `make_labels`."""
    from label_stores import Clock

    return Clock()


@pytest.fixture
def make_labels(tmp_path: Path, clock: Any) -> "Callable[..., LabelStore]":
    """Makes a store of labels with some questions."""
    from lmgym.preferences import Item, LabelStore

    def made(count: int = 6, name: str = "labels.db", texts: int = 2) -> LabelStore:
        store = LabelStore(tmp_path / name, create=True, clock=clock)
        store.add_items([Item(f"prompt {i}", tuple(f"text {i}.{k}" for k in range(texts))) for i in range(count)])
        return store

    return made


@pytest.fixture
def probe() -> "LanguageModel":
    """The built-in random GPT-2 over the letters a to d, pad 0 and eos 1: absolute positions."""
    import lmgym

    return lmgym.load("probe")


@pytest.fixture
def gpt2() -> "LanguageModel":
    """A random GPT-2 with the probe's tokenizer and dropout in its config: absolute positions."""
    return random_gpt2()


@pytest.fixture
def llama() -> "LanguageModel":
    """A random Llama with the probe's tokenizer: rotary positions."""
    return random_model("LlamaConfig")


def random_gpt2(positions: int = 24) -> "LanguageModel":
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    return random_model("GPT2Config", n_inner=64, max_position_embeddings=positions, **dropout)


def random_model(config: str, **settings: Any) -> "LanguageModel":
    """A small untrained model of any architecture, in training mode as transformers makes it."""
    import transformers

    import lmgym

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6}
    ids = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    sizes |= {} if config == "GPT2Config" else {"intermediate_size": 64, "max_position_embeddings": 64}
    made = getattr(transformers, config)(**(sizes | ids | {"initializer_range": 0.3} | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(made)
    return lmgym.LanguageModel(model.train(), lmgym.load("probe").tokenizer, config)


def as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every module believe that looking at a tensor makes the host wait for the device."""
    patched = 0
    for name, module in list(sys.modules.items()):
        if (
            name.split(".")[0] in ("lmgym", "agents")
            and name != "lmgym.devices"
            and hasattr(module, "host_reads_are_free")
        ):
            monkeypatch.setattr(module, "host_reads_are_free", lambda device: False)
            patched += 1
    assert patched >= 4, "modules that ask host_reads_are_free() are loaded before this is called"


def step_down(learner: Any, loss: torch.Tensor) -> None:
    """One optimizer step down the gradient of a loss that is given whole."""
    learner.backward(loss)
    learner.optimizer_step()
