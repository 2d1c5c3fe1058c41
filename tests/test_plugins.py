"""Parts that others bring: algorithms and tasks by file, module and entry point; a run that sends its metrics away."""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
from gymnasium.envs import registration

from agents import cli
from agents.pipeline import catalog
from agents.runs import Run
from lmgym import registry

pytestmark = pytest.mark.timeout(300)

QUICK = ["--sft.examples=16", "--sft.test-examples=4", "--test-prompts=8", "--samples=1"]

MINE = '''"""My own: REINFORCE without a baseline."""

from dataclasses import dataclass

import lmgym


@dataclass
class Config:
    updates: int = 2
    """Rollouts."""


DEFAULTS = {"rows": 4}
METRICS = {"mine/loss": "the loss"}


def train(policy, env, learner, config):
    buffer = lmgym.RolloutBuffer.like(env)
    for update in range(config.updates):
        lmgym.collect(policy, env, buffer, lmgym.Stream(learner.seed, update))
        logp = policy.evaluate(buffer.sequences).logp
        loss = -(buffer.rewards.sum(1, keepdim=True) * logp)[buffer.is_action].mean()
        learner.step(loss)
        yield {"mine/loss": loss.item(), "mine/rows": float(buffer.rows)}
'''

TASK = """import lmgym


class Long(lmgym.Task):
    name, budgets = "long", {"max_new_tokens": 5, "max_prompt_tokens": 10}

    def sample(self, rng, split="train"):
        return lmgym.Prompt(f"{rng.integers(100)} and")

    def score(self, prompts, completions):
        return [float(len(c.text)) for c in completions]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package "others" with an algorithm and a task, importable as if it were installed."""
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "mine.py").write_text(MINE)
    (folder / "tasks.py").write_text(TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "others"]:
        del sys.modules[name]


def rows_of(run: Path, stage: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["stage"] == stage]


@pytest.mark.parametrize("how", ["others.mine", "file"])
def test_train_takes_an_algorithm_of_your_own(package: Path, tmp_path: Path, how: str) -> None:
    name = how if how != "file" else str(package / "mine.py")
    out = tmp_path / "run"
    assert cli.main(["train", "Sort", "--algorithm", name, "--mine.updates=3", *QUICK, "--out", str(out)]) == 0
    rows = rows_of(out, "mine")
    assert len(rows) == 3, "--mine.updates is an option"
    assert all(row["mine/rows"] == 4 for row in rows), "DEFAULTS are heeded"
    assert json.loads((out / "metrics.json").read_text())["mine"]["mine/loss"] == "the loss"
    assert (out / "policy" / "adapter_model.safetensors").is_file()


def test_entry_points_name_algorithms(package: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    points = [EntryPoint("theirs", "others.mine", catalog.GROUP)]
    monkeypatch.setattr(catalog, "entry_points", lambda group: [p for p in points if p.group == group])
    assert cli.main(["algorithms"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "My own: REINFORCE without a baseline." in lines["theirs"]
    assert set(lines) == {*catalog.BUILT_IN, "theirs"}
    assert "2017" in lines["ppo"]
    assert catalog.find("theirs").DEFAULTS == {"rows": 4}


def test_entry_points_name_tasks(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("others/Long-v0", "others.tasks:Long", registry.GROUP)]
    monkeypatch.setattr(registry, "TABLE", {})
    monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])
    monkeypatch.setattr(registration, "registry", {})
    registry.register_all()
    assert "others.tasks" not in sys.modules, "it is imported when it is made"
    env: Any = gym.make("others/Long-v0").unwrapped
    assert env.row.max_new_tokens == 5, "the task's own budgets"
    env = gym.make("others/Long-v0", max_new_tokens=7).unwrapped
    assert env.row.max_new_tokens == 7
    assert env.row.max_prompt_tokens == 10


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("class Config", "class Settings"), "no dataclass `Config`"),
        (("@dataclass\n", ""), "no dataclass `Config`"),
        (("updates: int = 2", "updates: int"), "no default for 'updates'"),
        (("def train", "def learn"), "no function `train`"),
        (("def train(policy, env,", "def train(env, policy,"), "takes (env, policy, learner, config)"),
        (("updates: int = 2", "rows: int = 2"), "'rows', which all algorithms have already"),
        (('{"rows": 4}', '{"row": 4}'), "sets 'row'"),
        (("learner, config)", "learner, config, oracle)"), "wants 'oracle', which lmgym train cannot give"),
    ],
)
def test_what_is_no_algorithm_is_refused(
    package: Path, tmp_path: Path, capsys: Any, change: tuple[str, str], said: str
) -> None:
    assert MINE.count(change[0]) >= 1
    (package / "mine.py").write_text(MINE.replace(*change))
    out = tmp_path / "run"
    assert cli.main(["train", "Sort", "--algorithm", "others.mine", *QUICK, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists() or not any(out.iterdir()), "the folder can be used again"


def test_settings_that_cannot_be_are_refused_before_anything_is_trained(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    for arguments, said in (
        (["--algorithm=rloo", "--rloo.group=5"], "choose a group of 2, 4, 8"),
        (["--algorithm=a2c", "--a2c.critic=none"], "needs a critic"),
        (["--ppo.kl-loss=k1"], "0.714"),
        (["--ppo.updates=-1"], "--updates -1 is negative"),
        (["--ppo.beta=-1"], "beta=-1.0 must be 0 or more"),
        (["--algorithm=distill"], "--teacher RUN"),
        (["--algorithm=distill", "--teacher=nowhere"], "no teacher in 'nowhere'"),
        (["--device=tpu"], "--device tpu"),
        (["--algorithm=gropo"], "Did you mean 'grpo'?"),
    ):
        assert cli.main(["train", "Sort", *arguments, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists() or not any(out.iterdir())
    with pytest.raises(SystemExit):
        cli.main(["train", "Sort", "--algorithm=rloo", "--rloo.gorup=2", "--out", str(out)])
    assert "--rloo.group" in capsys.readouterr().err


def test_dpo_learns_from_comparisons_and_distillation_from_a_run(tmp_path: Path) -> None:
    asked = ["--preferences.prompts=16", "--preferences.test-prompts=8"]
    first, second = tmp_path / "dpo", tmp_path / "distill"
    assert cli.main(["train", "--algorithm=dpo", *asked, *QUICK, "--out", str(first)]) == 0
    assert rows_of(first, "dpo")
    assert not rows_of(first, "reward_model"), "DPO needs none"
    assert not (first / "reward_model").exists()
    arguments = [
        "--algorithm=distill",
        f"--teacher={first}",
        "--reward=task",
        "--distill.updates=2",
        "--distill.rows=8",
    ]
    assert cli.main(["train", "Sort", *arguments, *QUICK, "--out", str(second)]) == 0
    assert rows_of(second, "distill")[0]["distill/kl_nats"] > 0


def test_prompts_without_any_score_are_trained_from_comparisons(tmp_path: Path, capsys: Any) -> None:
    """No gold score is made up, and fine-tuning takes the preferred texts."""
    texts = [(f"Prompt {i}:", " It was great.", " It was bad.") for i in range(40)]
    rows = [{"prompt": p, "chosen": good, "rejected": bad} for p, good, bad in texts]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    few = ["--ppo.updates=1", "--ppo.rows=4", "--reward.normalise-on=8", "--preferences.completions=2", *QUICK]
    assert cli.main(["train", f"--preferences={file}", f"--prompts={file}", *few, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "the preferred texts of the comparisons take their place" in said
    assert "gold" not in json.loads((out / "evaluation.json").read_text())["after"]
    assert all("gold/mean" not in row for row in rows_of(out, "ppo"))
    sample = json.loads((out / "samples.jsonl").read_text().splitlines()[0])
    assert sample["gold"] is None


def test_stages_alone(tmp_path: Path, capsys: Any) -> None:
    stories = tmp_path / "stories.jsonl"
    stories.write_text(
        "".join(json.dumps({"text": f"The {i} dogs ran over the hill and far."}) + "\n" for i in range(30))
    )
    whole = [f"--prompts={stories}", "--opening-words=3"]
    sft = ["--examples=8", "--test-examples=4", "--out", str(tmp_path / "sft")]
    assert cli.main(["sft", *whole, *sft]) == 0, "fine-tuning needs no score"
    assert cli.main(["sample", *whole, "--count=2", "--model", str(tmp_path / "sft" / "sft")]) == 0
    asked = ["--preferences.prompts=8", "--preferences.test-prompts=8", "--out", str(tmp_path / "asked")]
    assert cli.main(["preferences", "Sort", *asked]) == 0
    assert (tmp_path / "asked" / "preferences.jsonl").is_file()
    capsys.readouterr()
    assert cli.main(["evaluate", "Sort", "--count=8"]) == 0
    assert "kl_nats" not in capsys.readouterr().out, "the model alone is the reference: there is no KL to speak of"
    assert cli.main(["evaluate", *whole]) == 2
    assert "need a score" in capsys.readouterr().err
    assert cli.main(["evaluate", "Sort", "--reward=learned"]) == 2
    assert "evaluate trains no reward model" in capsys.readouterr().err


def test_metrics_are_sent_only_where_they_are_asked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    service = SimpleNamespace(
        init=lambda **more: calls.append(more),
        log=lambda row: calls.append(row),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", service)
    with Run(tmp_path / "quiet", {"seed": 0}) as run:
        run.log("ppo", 0, {"score/mean": 1.0})
    assert calls == []
    with Run(tmp_path / "sent", {"seed": 0}, track=["trackio"]) as run:
        run.log("ppo", 7, {"score/mean": 1.0})
    assert calls[0] == {"project": "lmgym", "name": "sent", "config": {"seed": 0}}
    assert calls[1:] == [{"ppo/score/mean": 1.0, "ppo/step": 7}, "finish"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'lmgym\[wandb\]'"):
        Run(tmp_path / "missing", {}, track=["wandb"])
    assert not (tmp_path / "missing").exists()
