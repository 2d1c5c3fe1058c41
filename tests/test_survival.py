"""Interrupted runs go on with the same bits; bad numbers and full memory end as they should."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from conftest import as_on_an_accelerator, slow
from test_rollout import Waits

import lmgym
from agents import cli, grpo, ppo, sft
from agents.learner import Learner, LearnerConfig
from agents.pipeline.best import ControllerState
from agents.runs import Run, randomness, read_state, write_state
from agents.runs.compare import compare
from agents.runs.lock import LOCK_FILE
from agents.training import BadStep, RunningScale
from agents.training.batch import Batch
from agents.training.nonfinite import examine_batch
from lmgym import LanguageModel
from lmgym.models import Example
from lmgym.reward import AdaptiveKL, Score
from lmgym.tasks import Sort

pytestmark = pytest.mark.timeout(400)  # whole pipelines, on machines that may be busy

QUICK = [
    "train", "Sentiment", "--max-new-tokens=24", "--test-prompts=4", "--samples=1", "--checkpoint-seconds=0",
    "--sft.examples=16", "--sft.test-examples=4", "--sft.minibatch-rows=4", "--preferences.prompts=12",
    "--preferences.test-prompts=6", "--preferences.completions=2", "--reward.normalise-on=8", "--reward.epochs=1",
    "--ppo.updates=3", "--ppo.rows=4", "--ppo.minibatch-rows=2", "--ppo.kl-target-nats=6", "--ppo.scale-score",
]  # fmt: skip
SORT = ["train", "Sort", "--sft.examples=0", "--test-prompts=4", "--samples=1", "--checkpoint-seconds=0"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing the page takes as long as the run."""
    monkeypatch.setattr("agents.report.write_report", lambda folder: Path(folder) / "report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert cli.main([*QUICK, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, without stages before it, that was interrupted after its first update."""
    folder = tmp_path_factory.mktemp("runs") / "cut"
    with pytest.MonkeyPatch.context() as monkeypatch:
        at(monkeypatch, "ppo", 1, terminate)
        arguments = [*SORT, "--ppo.rows=4", "--ppo.updates=2", "--max-new-tokens=4"]
        assert cli.main([*arguments, "--out", str(folder)]) == 143
    return folder


def at(monkeypatch: pytest.MonkeyPatch, stage: str, step: int, act: Callable[[Run], object]) -> None:
    """Does something to a run once, after a step."""
    boundary, done = Run._after_step, []

    def wrapped(self: Run, where: str, number: int, *rest: Any) -> None:
        if (where, number) == (stage, step) and not done:
            done.append(True)
            act(self)
        boundary(self, where, number, *rest)

    monkeypatch.setattr(Run, "_after_step", wrapped)


def terminate(_: Run) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        slow("sft", 2),
        slow("sample train", 1),
        slow("reward_model", 1),
        slow("sample to normalise", 1),
        slow("ppo", 1),
        ("ppo", 3),
    ],
)
def test_a_run_that_was_interrupted_ends_with_the_same_bits(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    step: int,
) -> None:
    at(monkeypatch, stage, step, terminate)
    arguments = [*QUICK, "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert f"SIGTERM after {stage} {step}; to resume: lmgym train --resume {tmp_path / 'run'}" in said.err
    assert cli.main(arguments) == 0
    assert f"after step {step} of {stage}" in " ".join(capsys.readouterr().out.split())
    assert all(compare(whole, tmp_path / "run").values())


@pytest.mark.slow
def test_a_run_that_fine_tuned_an_adapter_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes after is made by the merged weights, whether they were merged or read."""
    arguments = [*QUICK, "--sft.lora-rank=2", "--reward.lora-rank=2", "--out"]
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    at(monkeypatch, "ppo", 1, terminate)
    assert cli.main([*arguments, str(tmp_path / "cut")]) == 143
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert all(compare(tmp_path / "whole", tmp_path / "cut").values())


@pytest.mark.slow
def test_a_run_goes_on_by_its_folder_alone_wherever_that_is(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, "ppo", 2, terminate)
    assert cli.main([*QUICK, "--out", str(tmp_path / "here")]) == 143
    (tmp_path / "here").rename(tmp_path / "there")
    there = str(tmp_path / "there")
    assert cli.main(["train", "--resume", there, "--ppo.lr", "1"]) == 2
    assert "options.ppo.lr is 0.002 there, and 1.0 here" in capsys.readouterr().err
    assert cli.main(["sft", "--resume", there]) == 2
    assert "is a run of `lmgym train`" in capsys.readouterr().err
    assert cli.main(["train", "--resume", there]) == 0
    assert all(compare(whole, tmp_path / "there").values())
    assert cli.main(["train", "--resume", there]) == 2
    assert "finished" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, "ppo", 2, terminate)
    arguments = [*QUICK, "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 143
    newest = max((tmp_path / "run" / "checkpoints").iterdir()) / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert cli.main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "tensors.safetensors' is damaged (its checksum is wrong): using the one before it" in out
    assert "after step 1 of ppo" in out
    assert all(compare(whole, tmp_path / "run").values())


@pytest.mark.parametrize(
    "forge",
    [
        lambda data: data["run"].pop("step"),
        lambda data: data["run"].update(finished=3),
        lambda data: data["run"].update(finished={"sft": {"result": True, "outputs": {"../../etc": "0"}}}),
        lambda data: data["run"].update(finished={"sft": {}}),
        lambda data: data["run"].update(finished={"sft": {"result": True, "outputs": "sft"}}),
        lambda data: data["run"].update(last_rows={"ppo": 3}),
        lambda data: data["run"].update(seconds=10**400),
        lambda data: data["alarms"].update(entropy="much"),
        lambda data: data["alarms"].update(rows=[{"gold/mean": "much"}]),
        lambda data: data["random"]["numpy"].__setitem__(1, 10**8),
        lambda data: data["run"].update(metrics_bytes=10**9),
        lambda data: data.update(learner={"learner": {"position": "three"}}),
        lambda data: data.update(alarms={"given": 7}),
        lambda data: data.update(random={}),
    ],
)
def test_a_forged_checkpoint_is_refused_in_one_line(
    forge: Callable[[Any], object], cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checksum is right, and what it says is not."""
    shutil.copytree(cut, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    state = read_state(newest)
    forge(state.data)
    write_state(newest, state)
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    ["nonsense", "[1]", '{"a": 1}', '{"stage": "ppo", "step": 0, "x": "y"}', '{"stage": "ppo", "step": "first"}', ""],
)
def test_rows_of_metrics_that_the_run_did_not_write_are_refused_in_one_line(
    line: str, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cut, tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(f"{line:{metrics.stat().st_size - 1}}\n" if line else "")
    for _ in range(2):  # the folder is not held on to
        assert cli.main(["train", "--resume", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "metrics.jsonl' is not what the run wrote there" in error


@pytest.mark.parametrize(
    "change",
    [{"inputs": []}, {"inputs": None}, {"versions": 3}, {"threads": "many"}, {"threads": 10**6}, {"options": []}],
)
def test_a_changed_config_ends_in_no_traceback(
    change: dict[str, Any], cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cut, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert cli.main(["train", "--resume", str(tmp_path / "run")]) in (0, 2)
    assert capsys.readouterr().err.count("\n") <= 1


def test_more_threads_than_there_can_be_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", "Sort", "--threads", "1000000"]) == 2
    assert "--threads 1000000 is out of range: give 0 to 1024" in capsys.readouterr().err


def test_results_without_checkpoints_are_not_overwritten(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert cli.main([*QUICK, "--out", str(tmp_path / "run")]) == 2
    assert "holds results, and no checkpoint to resume from: nothing was changed" in capsys.readouterr().err
    assert all(compare(whole, tmp_path / "run").values())


def test_a_folder_called_like_an_algorithm_is_no_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as the folder that the run itself is in."""
    monkeypatch.chdir(tmp_path)
    at(monkeypatch, "ppo", 1, terminate)
    assert cli.main([*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out", "ppo/tiny"]) == 143
    assert json.loads((tmp_path / "ppo" / "tiny" / "config.json").read_text())["inputs"] == {}
    (tmp_path / "tiny").mkdir()
    (tmp_path / "task").mkdir()
    assert cli.main(["train", "--resume", "ppo/tiny"]) == 0


@pytest.mark.slow
def test_a_folder_whose_name_begins_with_a_dash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    at(monkeypatch, "ppo", 1, terminate)
    assert cli.main([*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out=-run"]) == 143
    assert "lmgym train --resume=-run" in capsys.readouterr().err
    assert cli.main(["train", "--resume=-run"]) == 0
    assert cli.main(["repeat", "./-run"]) == 0
    assert (tmp_path / "-run-repeat").is_dir()


@pytest.mark.slow
def test_a_run_is_repeated_from_inside_and_without_its_time_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*SORT, "--ppo.rows=4", "--ppo.updates=1", "--max-time=0.001", "--out", str(tmp_path / "run")]
    assert [cli.main(arguments) for _ in range(4)] == [3, 3, 3, 0]
    monkeypatch.chdir(tmp_path / "run")
    assert cli.main(["repeat", "."]) == 0
    assert (tmp_path / "run-repeat" / "evaluation.json").exists()


def test_what_a_finished_stage_left_must_still_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    at(monkeypatch, "ppo", 1, terminate)
    arguments = [*QUICK, "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 143
    weights = tmp_path / "run" / "reward_model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"12345678")
    assert cli.main(arguments) == 2
    assert "reward_model' is not what the run wrote there" in capsys.readouterr().err


def test_the_files_that_a_run_reads_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"say {i}:\n" for i in range(50)))
    at(monkeypatch, "ppo", 1, terminate)
    arguments = [*SORT, "--prompts", str(prompts), "--reward", "tiny-reward", "--ppo.rows=4", "--ppo.updates=2"]
    arguments += ["--max-new-tokens=4", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 143
    prompts.write_text("".join(f"shout {i}:\n" for i in range(50)))
    assert cli.main(arguments) == 2
    assert "prompts.txt has changed since the run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "reward"])
def test_stages_alone_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    preferences = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"is {i} good?", "chosen": f" yes, {i} is", "rejected": f" no {i}"} for i in range(12)]
    preferences.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = {
        "sft": ["sft", "Sort", "--examples=16", "--minibatch-rows=4", "--lora-rank=2", "--checkpoint-seconds=0"],
        "reward": ["reward", "--preferences", str(preferences), "--minibatch-prompts=2", "--checkpoint-seconds=0"],
    }[command]
    assert cli.main([*made, "--out", str(tmp_path / "whole")]) == 0
    at(monkeypatch, "sft" if command == "sft" else "reward_model", 3, terminate)
    assert cli.main([*made, "--out", str(tmp_path / "cut")]) == 143
    assert cli.main([command, "--resume", str(tmp_path / "cut")]) == 0
    assert all(compare(tmp_path / "whole", tmp_path / "cut").values())


def test_the_time_limit_saves_and_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out", str(tmp_path / "run")]
    assert cli.main([*arguments, "--max-time=0.001"]) == 3
    assert "the time limit of 0.001 s" in capsys.readouterr().err
    assert cli.main(arguments) == 0, "a limit is no option that results depend on"


def test_a_second_signal_ends_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(_: Run) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at(monkeypatch, "ppo", 1, twice)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert cli.main([*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out", str(tmp_path / "run")]) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if "ppo" in path.name]


def test_a_second_sigterm_has_its_own_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, "ppo", 1, lambda run: (terminate(run), terminate(run)))
    assert cli.main([*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out", str(tmp_path / "run")]) == 143


def test_a_command_whose_quotes_went_with_a_secret_is_not_kept(tmp_path: Path) -> None:
    arguments = ["train", "--out=password=it's"]
    with Run(tmp_path / "run", {"seed": 0}, arguments=arguments) as run:
        kept = json.loads((run.folder / "config.json").read_text())
    assert kept["arguments"] is None
    assert "=it" not in kept["command"]


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with Run(tmp_path / "run", {"seed": 0}), pytest.raises(ValueError, match="another process is writing"):
        Run(tmp_path / "run", {"seed": 0})
    with pytest.raises(ValueError, match="holds another run \\(seed is 0 there, and 1 here\\)"):
        Run(tmp_path / "run", {"seed": 1})


def test_a_killed_writer_holds_no_folder(tmp_path: Path) -> None:
    """The system releases its lock; the lock file that it leaves is not a run."""
    folder = tmp_path / "run"
    folder.mkdir()
    code = "import os, sys; from pathlib import Path; from agents.runs.lock import FolderLock; " \
           "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdin=PIPE, stdout=PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process is writing"):
            Run(folder, {"seed": 0})
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE], "it was not touched"
        process.kill()
    assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
    with Run(folder, {"seed": 0}):
        assert (folder / "config.json").exists()
    assert not (folder / LOCK_FILE).exists()


def test_a_run_of_another_version_is_refused_in_one_line_and_left_alone(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cut, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    old = {name: value for name, value in json.loads(config.read_text()).items() if name != "format"}
    for form, arguments in itertools.product(
        (1, 99, "2", None), (["train", "--resume"], ["train", "--out"], ["repeat"])
    ):
        config.write_text(json.dumps(old if form == 1 else old | {"format": form}))
        before = sorted(path.name for path in (tmp_path / "run").iterdir())
        assert cli.main([*arguments, str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "another version of lmgym wrote" in error
        assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_run_goes_on_that_was_made_before_some_options_existed(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it does not record has its default; another value is still another run."""
    shutil.copytree(cut, tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    for options, name in ((config["options"], "chat_template"), (config["options"]["options"], "max_kl")):
        del options[name]
    for name in ("gradient_checkpointing", "top_p"):
        del config["options"]["options"]["ppo"][name]
    del config["options"]["options"]["reward"]
    file.write_text(json.dumps(config))
    resume = ["train", "--resume", str(tmp_path / "run")]
    assert cli.main([*resume, "--ppo.top-p=0.5"]) == 2
    assert "options.ppo.top_p is 1.0 there, and 0.5 here" in capsys.readouterr().err
    assert cli.main(resume) == 0


def test_a_folder_that_vanishes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("agents.runs.trackers.tensorboard_writer", lambda *_: None)
    at(monkeypatch, "ppo", 1, lambda run: shutil.rmtree(run.folder))
    assert cli.main([*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"cannot write '{tmp_path / 'run'}" in said
    assert "the folder no longer exists" in said


def test_tensorboard_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", full)
    assert cli.main([*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out", str(tmp_path / "run")]) == 2
    assert "tensorboard' (No space left on device)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_repeated_and_compared(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    again = tmp_path / "again"
    assert cli.main(["repeat", str(whole), "--out", str(again)]) == 0
    rows = (again / "metrics.jsonl").read_text().splitlines()
    rows[-1] = json.dumps(json.loads(rows[-1]) | {"score/mean": 0.123})
    (again / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert [name for name, same in compare(whole, again).items() if not same] == ["metrics.jsonl"]
    assert cli.main(["repeat", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err


ALGORITHM = '''"""Counts for itself."""
from dataclasses import dataclass
@dataclass(frozen=True)
class Config:
    """Nothing."""
    updates: int = 3
    """Rollouts."""
def train(policy, env, learner, config):
    for update in range(config.updates):
        yield {"score/mean": float(update)}
'''


def test_an_algorithm_that_counts_for_itself_begins_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(ALGORITHM)
    at(monkeypatch, "mine", 2, terminate)
    arguments = [*SORT, "--algorithm", str(tmp_path / "mine.py"), "--mine.rows=4", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 143
    assert cli.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]


def test_an_algorithm_called_like_a_stage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its updates would be taken for those of the stage, which are done."""
    for name in ("reward_model", "sft"):
        (tmp_path / f"{name}.py").write_text(ALGORITHM)
        arguments = [*SORT, "--algorithm", str(tmp_path / f"{name}.py"), "--out", str(tmp_path / "run")]
        assert cli.main(arguments) == 2
        assert "rename its file" in capsys.readouterr().err


# Learners and what they keep ---------------------------------------------------------------------------------------


def world(rows: int = 8, kind: str = "none", **config: Any) -> tuple[lmgym.Policy, lmgym.TokenVectorEnv, Learner]:
    lm = lmgym.load("tiny")
    lm.adapters.add("policy", rank=2)
    policy = lmgym.Policy(lm, critic="head")
    env = lmgym.TokenVectorEnv(rows, task=Sort(), model=lm, max_new_tokens=8, kl="sampled", beta=0.02)
    return policy, env, Learner(policy.parameters(), LearnerConfig(lr=1e-3, **config), seed=3)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_learner_goes_on_in_another_process_as_it_were(ema: float) -> None:
    """Moments, moving average, generator, the scale of scores and the place in the given texts."""
    settings = ppo.Config(updates=4, scale_score=True, ptx_coef=0.1, ptx_rows=3, minibatch_rows=4)
    texts = [Example(f"count {i}:", f" {i + 1}") for i in range(10)]
    policy, env, learner = world(ema_decay=ema)
    states = []
    for _ in ppo.train(policy, env, learner, settings, texts):
        states.append(learner.state())
        states[-1] = type(states[-1])(states[-1].data, {k: v.clone() for k, v in states[-1].tensors.items()})
    policy, env, other = world(ema_decay=ema)
    other.restore(states[1])
    assert len(list(ppo.train(policy, env, other, settings, texts))) == 2
    end, wanted = other.state(), states[-1]
    assert end.data == wanted.data
    assert {"scale/mean", "examples/order", "learner/generator"} <= set(end.tensors)
    assert all(torch.equal(end.tensors[name], tensor) for name, tensor in wanted.tensors.items())
    assert len(list(ppo.train(policy, env, other, settings, texts))) == 4, "it trains again when it is asked again"


@pytest.mark.parametrize("name", ["learner", "my/scale"])
def test_names_that_a_checkpoint_has_other_uses_for_are_refused(name: str) -> None:
    _, _, learner = world()
    with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
        learner.register(name, RunningScale())


def test_a_state_of_another_learner_is_refused_and_changes_nothing() -> None:
    policy, env, learner = world()
    next(ppo.train(policy, env, learner, ppo.Config(updates=1)))
    state = learner.state()
    before = [p.detach().clone() for p in learner.parameters]
    _, _, other = world(ema_decay=0.5)
    for target, changed in (
        (other, {}),
        (learner, {"learner/optimizer/0000/exp_avg": torch.zeros(3)}),
        (learner, {"learner/optimizer/0000/more": torch.zeros(3)}),
        (learner, {"learner/parameter/0001": torch.zeros(3)}),
    ):
        with pytest.raises(ValueError, match="the checkpoint"):
            target.restore(type(state)(state.data, state.tensors | changed))
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))
    with pytest.raises(ValueError, match="an integer"):
        learner.restore(type(state)({"learner": state.data["learner"] | {"position": 1.5}}, state.tensors))


def test_a_controller_of_kl_goes_on_where_it_was() -> None:
    one, other = AdaptiveKL(0.2, 6.0, 100.0), AdaptiveKL(0.2, 6.0, 100.0)
    one.update(12.0, 64)
    ControllerState(other).restore(ControllerState(one).state())
    assert other == one != AdaptiveKL(0.2, 6.0, 100.0)


def test_the_running_scale_takes_only_numbers_that_are_some() -> None:
    one, two, last = RunningScale(), RunningScale(), torch.zeros(())
    x = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for part in x.split(7):
        last = one.update(part)
        two.update(torch.cat([part, torch.tensor([float("nan"), float("inf")])]))
    assert last == pytest.approx(float(x.std()), rel=1e-5)
    assert two.update(torch.tensor([float("nan")])) == pytest.approx(float(x.std()), rel=1e-5)


# Numbers that are none ---------------------------------------------------------------------------------------------


def poisoned(env: lmgym.TokenVectorEnv, row: int, value: float, update: int = 1) -> None:
    """The score of one row of one rollout is no number."""
    kept, calls = env.score, []

    def score(prompts: Any, completions: Any) -> list[float]:
        calls.append(len(completions))
        scores = kept(prompts, completions)
        return [value if len(calls) == update and i == row else s for i, s in enumerate(scores)]

    env.score = Score({kept.names[0]: score}, finite=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", [ppo, grpo])
def test_a_bad_reward_stops_the_step_and_names_the_row(algorithm: Any, value: float) -> None:
    policy, env, learner = world()
    poisoned(env, 5, value)
    before = [p.detach().clone() for p in learner.parameters]
    config = ppo.Config(updates=2) if algorithm is ppo else grpo.Config(updates=2, group=4, kl_loss="none")
    with pytest.raises(BadStep, match=f"row \\d: the reward is {value} at token") as found:
        list(algorithm.train(policy, env, learner, config))
    assert "update 0, step 0: the gradient is not finite, and the step was not taken" in str(found.value)
    assert env.prompts[5].text in str(found.value)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))
    reproduction = found.value.reproduction
    assert not bool(reproduction.tensors["rewards"].isfinite().all())
    assert sum(name.startswith("parameter/") for name in reproduction.tensors) == len(learner.parameters)


def test_a_row_whose_gradient_alone_is_bad_is_found() -> None:
    """Its loss is 0, and √ has no gradient there."""
    policy, env, _ = world()
    buffer = lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    batch = Batch.of(buffer, buffer.rewards)

    def loss_with(bad: list[int]) -> Any:
        def loss(new: Any, old: Batch) -> torch.Tensor:
            is_bad = torch.stack([(old.sequences.tokens == batch.sequences.tokens[i]).all(1) for i in bad]).any(0)
            zero = torch.where(is_bad[:, None], new.logp - new.logp.detach(), 1.0)
            return torch.where(is_bad[:, None], zero.sqrt(), new.logp)

        return loss

    weights = torch.ones_like(buffer.logp)
    texts = [tuple(tokens) for tokens in batch.sequences.tokens.tolist()]
    same = [i for i, text in enumerate(texts) if text == texts[3]]
    findings, state = examine_batch(policy, batch, loss_with([3]), weights)
    assert [finding.row for finding in findings] == same
    assert all("the gradient is not finite" in str(finding) for finding in findings)
    more = batch[torch.arange(len(texts) + 2) % len(texts)]
    every, state = examine_batch(policy, more, loss_with(list(range(len(texts)))), weights[:1].expand_as(more.mask))
    assert len(every) == len(texts) + 2
    assert state.data["rows"] == list(range(8)), "a reproduction holds eight rows at most"


def test_a_row_is_examined_with_its_own_weights() -> None:
    policy, env, _ = world()
    buffer = lmgym.collect(policy, env, lmgym.RolloutBuffer.like(env), lmgym.Stream(0, 0))
    weights = torch.ones_like(buffer.logp)
    weights[3] = float("inf")
    findings, _ = examine_batch(policy, Batch.of(buffer, buffer.rewards), lambda new, old: new.logp, weights)
    assert [finding.row for finding in findings] == [3]
    assert "the loss is" in str(findings[0])


def test_bad_steps_are_skipped_and_counted() -> None:
    policy, env, learner = world()
    learner.guard.on_bad_step = "skip"
    poisoned(env, 5, float("nan"))
    before = [p.detach().clone() for p in learner.parameters]
    updates = ppo.train(policy, env, learner, ppo.Config(updates=2, epochs=1, minibatch_rows=4))
    assert next(updates)["optimizer/bad_steps"] == 2, "advantages are whitened over the rollout: no row is left"
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))
    assert all(int(of["step"]) == 0 for of in learner.optimizer.state.values())
    row = next(updates)
    assert row["optimizer/bad_steps"] == 0
    assert all(bool(p.isfinite().all()) for p in learner.parameters)
    assert not any(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True) if bool(b.any()))


def test_on_a_gpu_nobody_waits_and_the_update_ends_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator: the step itself looks at nothing, and what it refused is found at the end of the update."""
    as_on_an_accelerator(monkeypatch)
    policy, env, learner = world()
    move, waits = learner.optimizer_step, Waits()

    def watched(examine: Any = None) -> None:
        waits.on = True
        with waits:
            move(examine)
        waits.on = False

    monkeypatch.setattr(learner, "optimizer_step", watched)
    updates = ppo.train(policy, env, learner, ppo.Config(updates=3))
    next(updates)
    assert not waits.found
    poisoned(env, 2, float("nan"))
    before = [p.detach().clone() for p in learner.parameters]
    with pytest.raises(BadStep, match=r"update 1, .*the reward is nan"):
        next(updates)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))
    assert not waits.found


def test_a_ruined_parameter_is_found() -> None:
    policy, env, learner = world()
    with torch.no_grad():
        learner.parameters[1][0, 0] = float("nan")
    with pytest.raises(BadStep, match="1 of the parameters themselves are not finite"):
        list(ppo.train(policy, env, learner, ppo.Config(updates=1)))


def test_the_row_whose_own_loss_is_bad_is_found() -> None:
    """The rollout is sound, and one row's pass is not."""
    policy, env, learner = world()
    evaluate, bad = policy.evaluate, []

    def evaluated(sequences: Any, entropies: bool = True) -> Any:
        found = evaluate(sequences, entropies)
        bad[:] = bad or [sequences.prompt_ids[:1]]
        here = (sequences.prompt_ids == bad[0]).all(1, keepdim=True)
        return found._replace(logp=found.logp * torch.where(here, float("inf"), 1.0))

    policy.evaluate = evaluated  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(BadStep, match=r"row \d: the policy's log-probability is -?inf at token 0") as found:
        list(ppo.train(policy, env, learner, ppo.Config(updates=1)))
    assert "rows more" not in str(found.value)


def test_a_bad_text_in_fine_tuning_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = lmgym.load("tiny")
    for parameter in lm.model.parameters():
        parameter.requires_grad_(True)
    nll = sft.nll

    def bad(lm: LanguageModel, rows: Any, adapter: Any = None) -> Any:
        loss, mask = nll(lm, rows, adapter)
        return loss * torch.tensor([[float("nan") if "7" in lm.text.decode(ids) else 1.0] for ids, _ in rows]), mask

    monkeypatch.setattr(sft, "nll", bad)
    examples = [Example(f"say {i}:", f" {i}.") for i in range(5, 9)]
    learner = Learner(lm.model.parameters(), LearnerConfig())
    with pytest.raises(BadStep, match=r"row \d: the loss is nan. Its text: 'say 7: 7") as found:
        list(sft.train(lm, examples, [], learner, sft.Config(minibatch_rows=4)))
    assert "rows more" not in str(found.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [float('nan') if i == 2 else 1.0 for i in range(len(completions))]", "the score 'score' returned nan"),
        ("return [1.0 / (len(c.text) - len(c.text)) for c in completions]", "raised ZeroDivisionError"),
    ],
)
def test_a_score_that_fails_ends_in_one_line_with_its_text_and_a_reproduction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, said: str
) -> None:
    (tmp_path / "mine.py").write_text(f"def score(prompts, completions):\n    {body}\n")
    arguments = [*SORT, "--reward", f"{tmp_path / 'mine.py'}:score", "--ppo.rows=4", "--ppo.updates=1"]
    assert cli.main([*arguments, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert "of the prompt" in error
    kept = read_state(tmp_path / "run" / "bad_step")
    assert kept.data["name"] == "score"
    assert kept.data["prompt"]
    if "nan" in said:
        assert cli.main([*arguments, "--on-bad-step=skip", "--out", str(tmp_path / "skipped")]) == 0
        rows = [json.loads(line) for line in (tmp_path / "skipped" / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["optimizer/bad_steps"] > 0
        assert "NaN" not in (tmp_path / "skipped" / "metrics.jsonl").read_text()
        assert "were skipped" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_a_run_whose_scores_are_no_numbers_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def score(prompts, completions):\n    return [float('nan')] * len(completions)\n"
    )
    arguments = [*SORT, "--reward", f"{tmp_path / 'mine.py'}:score", "--ppo.rows=4", "--ppo.updates=2"]
    arguments += ["--on-bad-step=skip", "--out"]
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    at(monkeypatch, "ppo", 1, terminate)
    assert cli.main([*arguments, str(tmp_path / "cut")]) == 143
    assert cli.main([*arguments, str(tmp_path / "cut")]) == 0
    assert all(compare(tmp_path / "whole", tmp_path / "cut").values())


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [MemoryError("no"), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: x")]
)
@pytest.mark.parametrize("passes", [1, 2])
def test_a_step_that_memory_does_not_hold_is_taken_in_smaller_passes(error: Exception, passes: int) -> None:
    """With `passes` = 2 it runs out in the second pass of a step, when the first has left its gradient."""
    settings = ppo.Config(updates=2, minibatch_rows=8)
    policy, env, learner = world()
    wanted = list(ppo.train(policy, env, learner, settings))
    end = [p.detach().clone() for p in learner.parameters]

    policy, env, learner = world(micro_tokens=128 // passes, bucket=False)  # 8 rows of some 15 tokens
    said, calls = list[str](), list[int]()
    learner.say = said.append
    evaluate = policy.evaluate

    def limited(sequences: Any, entropies: bool = True) -> Any:
        calls.append(len(sequences.tokens))
        found = evaluate(sequences, entropies)
        if len(calls) == passes:
            raise error
        return found

    policy.evaluate = limited  # pyright: ignore[reportAttributeAccessIssue]
    found = list(ppo.train(policy, env, learner, settings))
    assert said
    assert all("with the same result" in text for text in said)
    assert max(calls[passes:]) <= calls[0] // 2, "passes of half as many rows, and for good"
    assert (calls[0] == 8) is (passes == 1)
    assert len(said) == 1
    for a, b in zip(end, learner.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for one, other in zip(wanted, found, strict=True):
        assert other == pytest.approx(one, rel=1e-3, abs=1e-5)


def test_a_row_that_memory_does_not_hold_ends_with_what_to_do() -> None:
    policy, env, learner = world()
    learner.say = lambda text: None

    def never(sequences: Any, entropies: bool = True) -> Any:
        raise MemoryError

    policy.evaluate = never  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(MemoryError, match="a pass of one row is the smallest"):
        list(ppo.train(policy, env, learner, ppo.Config(updates=1)))


def test_memory_that_runs_out_elsewhere_is_said_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(ppo, "collect", full)
    arguments = [*SORT, "--ppo.rows=4", "--ppo.updates=2", "--out", str(tmp_path / "run")]
    assert cli.main(arguments) == 2
    assert "memory ran out (MemoryError): take fewer or shorter completions" in capsys.readouterr().err


def test_other_errors_are_not_taken_for_memory() -> None:
    policy, env, learner = world()

    def wrong(sequences: Any, entropies: bool = True) -> Any:
        raise RuntimeError("shapes do not fit")

    policy.evaluate = wrong  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(ppo.train(policy, env, learner, ppo.Config(updates=1)))


def test_fine_tuning_takes_smaller_passes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example(f"say {i}:", f" {i}." * (i % 3 + 1)) for i in range(8)]

    def tuned(most: int) -> tuple[LanguageModel, list[dict[str, float]], list[str]]:
        lm, said = lmgym.load("tiny"), []
        lm.adapters.add("sft", rank=2)
        for parameter in lm.adapters.parameters("sft"):
            parameter.requires_grad_(True)
        learner = Learner(lm.adapters.parameters("sft"), LearnerConfig(), say=said.append)
        nll = sft.nll

        def limited(lm: LanguageModel, rows: Any, adapter: Any = None) -> Any:
            if len(rows) > most:
                raise MemoryError
            return nll(lm, rows, adapter)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "nll", limited)
            return lm, list(sft.train(lm, examples, [], learner, sft.Config(minibatch_rows=4), "sft")), said

    whole, rows, said = tuned(100)
    parts, part_rows, part_said = tuned(1)
    assert not said
    assert len(part_said) == 2, "4 rows, 2, 1"
    for a, b in zip(whole.adapters.parameters("sft"), parts.adapters.parameters("sft"), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert [row["loss/train"] for row in part_rows] == pytest.approx([row["loss/train"] for row in rows], rel=1e-5)


# What a run keeps about itself -------------------------------------------------------------------------------------


def test_global_generators_go_on_too(tmp_path: Path) -> None:
    import random

    import numpy as np

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002

    randomness.seed_everything(5)
    draw()
    state = randomness.GlobalGenerators().state()
    wanted = draw()
    randomness.seed_everything(6)
    randomness.GlobalGenerators().restore(state)
    assert draw() == wanted


def test_the_best_update_is_kept(tmp_path: Path) -> None:
    from agents.pipeline.best import BestParameters

    parameter = torch.zeros(3)
    best = BestParameters("score/mean", [parameter])
    for score in (0.1, 0.9, 0.3):
        parameter.fill_(score)
        best.update({"score/mean": score})
        again = BestParameters("score/mean", [parameter])
        again.restore(best.state())
        best = again
    assert (best.value, best.number) == (0.9, 2)
    with best.swapped_in():
        assert torch.equal(parameter, torch.full((3,), 0.9))
    assert torch.equal(parameter, torch.full((3,), 0.3))
    none = BestParameters("no such metric", [parameter])
    none.update({"score/mean": 1.0})
    none.restore(none.state())
    assert not none.copies


@pytest.fixture
def unwritable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only disk; permissions do not stop the user that tests often run as."""
    open_file = os.open

    def refuse(path: Any, flags: int, *more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(30, "Read-only file system")
        return open_file(path, flags, *more)

    monkeypatch.setattr("lmgym.io.atomic.os.open", refuse)


def test_a_read_only_disk_is_named_before_anything_is_trained(
    tmp_path: Path, unwritable: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*SORT, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert ".lock' (Read-only file system)" in said
    assert "choose another folder" in said
