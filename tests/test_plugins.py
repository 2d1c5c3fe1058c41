"""Parts that others bring: algorithms and tasks by file, module and entry point; a run that sends its metrics away."""

import json
import re
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
from agents.benchmark.agents import find_agent
from agents.cli.train import parse_options
from agents.pipeline import Options, PreferenceOptions, RewardOptions, RLOptions, SFTOptions
from agents.pipeline import load_algorithm as catalog
from agents.runs import Limits, Run
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
PRESETS = {"tuned": {"rows": 2, "updates": 1}}
METRICS = {"mine/loss": "the loss"}


def train(policy, env, learner, config):
    buffer = lmgym.RolloutBuffer.like(env)
    for update in range(config.updates):
        lmgym.collect(policy, env, buffer, lmgym.Stream(learner.seed, update))
        logp = policy.evaluate(buffer.sequences).logp
        loss = -(buffer.rewards.sum(1, keepdim=True) * logp)[buffer.is_action].mean()
        learner.backward(loss)
        learner.optimizer_step()
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


def test_a_preset_gives_settings_that_options_override(package: Path) -> None:
    name = str(package / "mine.py")
    _, algorithm = parse_options(["Sort", "--algorithm", name, "--preset", "tuned"])
    assert (algorithm.rl.rows, algorithm.config.updates) == (2, 1)
    _, algorithm = parse_options(["Sort", "--algorithm", name, "--mine.rows=8", "--preset=tuned"])
    assert (algorithm.rl.rows, algorithm.config.updates) == (8, 1)
    with pytest.raises(ValueError, match=r"algorithm 'mine' has no preset 'best'; it has tuned"):
        parse_options(["Sort", "--algorithm", name, "--preset", "best"])
    agent = find_agent(f"{name}:preset=tuned:updates=5")
    assert agent.config["rl"] == {"rows": 2}
    assert agent.config["config"] == {"updates": 5}
    assert find_agent("ppo:preset=tuned").config["config"] == find_agent("ppo").config["config"], "its defaults"
    with pytest.raises(ValueError, match=r"'ppo' has no preset 'best'; it has tuned"):
        find_agent("ppo:preset=best")


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
    points = [EntryPoint("others/Long-v0", "others.tasks:Long", registry.ENTRY_POINT_GROUP)]
    monkeypatch.setattr(registry, "TASK_SPECS", {})
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
    ("name", "meant"),
    [
        ("Sentimant", "lmgym/Sentiment-v0"),
        ("lmgym/sort-v0", "lmgym/Sort-v0"),
        ("arithmetics", "lmgym/Arithmetic-v0"),
        ("lmgym/Tree-v1", "lmgym/Tree-v0"),
    ],
)
def test_a_misspelt_environment_is_told_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"no task '{name}'. Did you mean {meant}"):
        registry.find_spec(name)


def test_a_name_that_is_like_no_other_has_no_suggestion() -> None:
    with pytest.raises(
        ValueError, match=r"no task 'xyz'\. Registered are: .*lmgym/Arithmetic-v0, .*, and reasoning/NAME"
    ):
        registry.find_spec("xyz")


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
        (
            ("learner, config)", "learner, config, oracle)"),
            "requires the argument 'oracle', which lmgym train cannot provide",
        ),
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


def status_of(arguments: list[str]) -> int:
    """The exit status of a command, whether `main` returns it or the parser of options exits with it."""
    try:
        return cli.main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def test_settings_that_cannot_be_are_refused_before_anything_is_trained(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    for arguments, said in (
        (["--algorithm=rloo", "--rloo.group=5"], "choose a group of 2, 4, 8"),
        (["--algorithm=a2c", "--a2c.critic=none"], "needs a critic"),
        (["--ppo.kl-loss=k1"], "0.714"),
        (["--ppo.updates=-1"], "updates=-1 must be at least 0"),
        (["--ppo.beta=-1"], "beta=-1.0 must be at least 0"),
        (["--ppo.rows=0"], "rows=0 must be at least 1"),
        (["--algorithm=distill"], "--teacher RUN"),
        (["--algorithm=distill", "--teacher=nowhere"], "no teacher in 'nowhere'"),
        (["--device=tpu"], "--device tpu"),
        (["--algorithm=gropo"], "Did you mean 'grpo'?"),
    ):
        assert status_of(["train", "Sort", *arguments, "--out", str(out)]) == 2
        assert said in capsys.readouterr().err
        assert not out.exists() or not any(out.iterdir())
    with pytest.raises(SystemExit):
        cli.main(["train", "Sort", "--algorithm=rloo", "--rloo.gorup=2", "--out", str(out)])
    assert "--rloo.group" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (RLOptions, {"rows": 0}, "rows=0 must be at least 1"),
        (RLOptions, {"lora_rank": 0}, "lora_rank=0 must be at least 1"),
        (RLOptions, {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        (RLOptions, {"temperature": float("inf")}, "temperature=inf must be above 0"),
        (RLOptions, {"top_k": -1}, "top_k=-1 must be at least 0"),
        (RLOptions, {"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        (RLOptions, {"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1"),
        (RLOptions, {"beta": float("nan")}, "beta=nan must be at least 0"),
        (RLOptions, {"kl_target_nats": -1.0}, "kl_target_nats=-1.0 must be at least 0"),
        (RLOptions, {"kl_horizon": 0.0}, "kl_horizon=0.0 must be above 0"),
        (RLOptions, {"lr": -1.0}, "lr=-1.0"),
        (SFTOptions, {"examples": -1}, "examples=-1 must be at least 0"),
        (SFTOptions, {"lora_rank": -1}, "lora_rank=-1 must be at least 0"),
        (SFTOptions, {"warmup": 2.0}, "warmup=2.0"),
        (PreferenceOptions, {"completions": 1}, "completions=1 must be at least 2"),
        (PreferenceOptions, {"error_rate": 0.5}, "error_rate=0.5 must be at least 0 and below 0.5"),
        (PreferenceOptions, {"prompts": 0}, "prompts=0 must be at least 1"),
        (RewardOptions, {"normalise_on": 1}, "normalise_on=1 must be at least 2"),
        (RewardOptions, {"lora_rank": -1}, "lora_rank=-1 must be at least 0"),
        (Options, {"test_prompts": 0}, "test_prompts=0 must be at least 1"),
        (Options, {"samples": -1}, "samples=-1 must be at least 0"),
        (Options, {"max_kl": -1.0}, "max_kl=-1.0 must be at least 0"),
        (Limits, {"checkpoint_seconds": -1.0}, "checkpoint_seconds=-1.0 must be at least 0"),
        (Limits, {"keep_checkpoints": 0}, "keep_checkpoints=0 must be at least 1"),
        (Limits, {"max_time": float("nan")}, "max_time=nan must be at least 0"),
    ],
)
def test_options_outside_their_range_are_refused_by_name(kind: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        kind(**options)


@pytest.mark.parametrize(
    ("options", "name", "said"),
    [
        (RLOptions(), "critic", "critic='haed' is unknown: choose from 'head', 'adapter', 'network', 'none'"),
        (Options(), "on_bad_step", "on_bad_step='haed' is unknown: choose from 'stop', 'skip'"),
    ],
)
def test_options_that_are_none_of_the_choices_are_refused_by_name(options: Any, name: str, said: str) -> None:
    object.__setattr__(options, name, "haed")  # the tests' check of types would refuse it before
    with pytest.raises(ValueError, match=re.escape(said)):
        options.__post_init__()


FUTURE = MINE.replace("from dataclasses", "from __future__ import annotations\n\nfrom dataclasses", 1)


def test_an_algorithm_in_a_file_may_postpone_its_annotations(tmp_path: Path) -> None:
    """A dataclass looks its own module up by name; two files of one name are two modules."""
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(FUTURE)
    one, other = (catalog.find(str(tmp_path / folder / "mine.py")) for folder in ("one", "other"))
    assert one is sys.modules[one.__name__]
    assert one is not other
    assert one.__name__ != other.__name__
    out = tmp_path / "run"
    name = str(tmp_path / "one" / "mine.py")
    assert cli.main(["train", "Sort", "--algorithm", name, "--mine.updates=1", *QUICK, "--out", str(out)]) == 0
    assert len(rows_of(out, "mine")) == 1


def test_a_module_in_the_current_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the console script starts: the path of modules has no entry for the current directory."""
    (tmp_path / "beside_me").mkdir()
    (tmp_path / "beside_me" / "algorithm.py").write_text(MINE)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    try:
        assert catalog.find("beside_me.algorithm").DEFAULTS == {"rows": 4}
        with pytest.raises(ValueError, match=r"no algorithm 'beside_me\.nothing'"):
            catalog.find("beside_me.nothing")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "beside_me"]:
            del sys.modules[name]


@pytest.mark.parametrize("how", ["file", "module"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("def train(:", "SyntaxError: invalid syntax"),
    ],
)
def test_an_algorithm_that_fails_while_it_is_imported_is_named_with_its_line(
    package: Path, capsys: Any, line: str, said: str, how: str
) -> None:
    (package / "mine.py").write_text(f"import math\n\n{line}\n")
    name = str(package / "mine.py") if how == "file" else "others.mine"
    assert cli.main(["train", "Sort", "--algorithm", name]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{name!r} cannot be imported: " in error
    assert said in error
    assert f"({package / 'mine.py'}, line 3)" in error


def test_a_train_that_does_not_yield_is_refused_in_one_line(package: Path, tmp_path: Path, capsys: Any) -> None:
    (package / "mine.py").write_text(MINE.replace("        yield {", "        last = {"))
    out = tmp_path / "run"
    assert cli.main(["train", "Sort", "--algorithm", "others.mine", *QUICK, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "`train` of the algorithm 'mine' returned NoneType and must be a generator" in error
    assert not out.exists() or not any(out.iterdir()), "the folder can be used again"


@pytest.mark.slow
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
    assert "the preferred texts of the comparisons are used instead" in said
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
