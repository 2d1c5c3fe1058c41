"""The compiled training pass against the one that is run as it is."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import full, random_model
from test_fast import made

from agents import ppo
from agents.learner import Learner, LearnerConfig
from lmgym import Policy
from lmgym.testing import TablePolicy

ROOT = Path(__file__).resolve().parents[1]
ONCE = ppo.Config(updates=1, epochs=2, minibatch_rows=8)


def compiled(what: str) -> Any:
    command = [sys.executable, str(ROOT / "tests" / "compiled.py"), what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["GPT2Config", full("Qwen3Config")])
def test_compiled_gradients_are_the_same_and_one_compilation_serves_every_shape(config: str) -> None:
    """Observed: 2e-7."""
    found = compiled(config)
    assert max(found["far"]) < 1e-5
    assert found["graphs"] == 1


@pytest.mark.slow
@pytest.mark.full
def test_the_ratio_starts_at_one_in_bfloat16_too() -> None:
    """A compiled pass rounds where the other does, which gives the rollout's log-probabilities."""
    found = compiled("ratios")
    assert found["ratio"] < 1e-6
    assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-3)


def test_the_learner_compiles_what_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Policy] = []
    monkeypatch.setattr(Policy, "compile", lambda self: seen.append(self))
    policy, env = made(random_model("GPT2Config", n_inner=64))
    for wanted in (False, True):
        learner = Learner(policy.parameters(), LearnerConfig(compile=wanted), 0)
        list(ppo.train(policy, env, learner, ONCE))
        assert seen == [policy] * wanted


def test_what_cannot_be_compiled_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, env = made(random_model("GPT2Config", n_inner=64))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert shutil.which("no-such-compiler") is None
    with pytest.raises(ValueError, match=r"C\+\+ compiler.*'no-such-compiler'.*leave compile off"):
        policy.compile()
    policy.lm.fast = False
    with pytest.raises(ValueError, match="through transformers: fast is off"):
        policy.compile()
    table = TablePolicy(6, 5)
    learner = Learner(table.parameters(), LearnerConfig(compile=True))
    with pytest.raises(ValueError, match="this is a TablePolicy"):
        list(ppo.train(table, env, learner, ONCE))
