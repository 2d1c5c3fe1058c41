"""The command line: what it prints, how fast, and what it says to bad input."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lmgym
from agents import cli, rloo
from agents.cli import evaluate
from agents.cli.help import first_sentence, options_table
from agents.cli.names import setting_of
from agents.cli.options import Common
from agents.evaluate import EvaluationReport
from agents.runs.profiling import PHASES
from agents.tools import make_option_table
from lmgym.tasks.base import Completion, Prompt

# Whole pipelines, on machines that may be busy.
pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    "--max-new-tokens=24",
    "--sft.examples=32",
    "--sft.test-examples=8",
    "--preferences.prompts=24",
    "--preferences.test-prompts=12",
    "--reward.normalise-on=16",
    "--ppo.updates=2",
    "--ppo.rows=8",
    "--ppo.epochs=1",
    "--test-prompts=16",
    "--samples=2",
]


def run_python(*arguments: str) -> tuple[subprocess.CompletedProcess[str], float]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return done, time.perf_counter() - began


def test_help_answers_at_once_and_imports_no_torch() -> None:
    program = "import sys; from agents import cli; code = cli.main(['--help']); print('torch' in sys.modules, code)"
    took = []
    for _ in range(3):
        done, seconds = run_python("-c", program)
        assert done.stdout.strip().endswith("False 0"), done.stderr
        assert all(f"  {command} " in done.stdout for command in cli.COMMANDS)
        took.append(seconds)
    assert min(took) < 1.0


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_help_of_a_command_is_short_and_imports_no_torch(command: str) -> None:
    call = f"code = cli.main([{command!r}, '--help'])"
    program = f"import sys; from agents import cli; {call}; print('torch' in sys.modules, code)"
    took = []
    for _ in range(3 if command == "train" else 1):
        done, seconds = run_python("-c", program)
        assert done.stdout.strip().endswith("False 0"), done.stderr
        assert "--help-all" in done.stdout
        assert len(done.stdout.splitlines()) < 60
        took.append(seconds)
    assert command != "train" or min(took) < 1.0


def test_short_help_says_what_the_options_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_option_table.table() == options_table(), "run python -m agents.tools.make_option_table"
    assert cli.main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    table = options_table()["commands"]["train"]
    known = {row[0]: row for row in [*table["options"], *options_table()["algorithms"]["ppo"]]}
    for name in table["shown"]:
        _, default, _, text = known[name]
        assert " ".join(f"{name} {first_sentence(text)}".split()) in said
        assert not default or f"(default: {default})" in said
    assert cli.main(["train", "--algorithm=rloo", "-h"]) == 0
    assert "--ppo" not in capsys.readouterr().out


def test_all_options_are_listed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the table, without torch; of an algorithm that the table does not have, from its options."""
    program = """
import sys
from agents import cli
cli.main(["train", "--algorithm", "rloo", "--help-all"])
print("torch" in sys.modules)
"""
    done, _ = run_python("-c", program)
    assert done.stdout.strip().endswith("False"), done.stderr
    said = " ".join(done.stdout.split())
    for option in options_table()["commands"]["train"]["options"] + options_table()["algorithms"]["rloo"]:
        assert f"{option[0]} {option[3]}" in said
    assert "(one of: error, truncate; default: error)" in said
    assert "(off: --rloo.no-bucket; default: True)" in said
    file = tmp_path / "mine.py"
    file.write_text(Path(rloo.__file__).read_text("utf-8").replace("group: int = 4", "team: int = 4"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--algorithm", str(file), "--help-all"])
    assert stopped.value.code == 0
    assert "--mine.team INT" in capsys.readouterr().out


def test_importing_lmgym_is_quick_and_imports_no_torch() -> None:
    """Its own share, in processor time, so that a busy machine does not decide; gymnasium and NumPy are the rest."""
    program = (
        "import gymnasium, sys, time; t = time.process_time(); import lmgym; "
        "print(time.process_time() - t, any(name in sys.modules for name in ('torch', 'transformers', 'tyro')))"
    )
    took = []
    for _ in range(3):
        seconds, heavy = run_python("-c", program)[0].stdout.split()
        assert heavy == "False"
        took.append(float(seconds))
    assert min(took) < 0.05


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "Did you mean 'train'"),
        (["train", "Sentimental"], "lmgym/Sentiment-v0"),
        (["train", "sort"], "Did you mean "),
        (["sample", "Srot"], "Did you mean "),
        (["train", "Sort", "--model", "tinny"], "no model 'tinny'. Did you mean 'tiny'"),
        (["sample", "Sort", "--model", "prob"], "Did you mean 'probe'"),
        (["train", "Sort", "--reward", "lerned"], "Did you mean 'learned'"),
        (["train", "Sort", "--reward", "tiny-rewards"], "Did you mean 'tiny-reward'"),
        (["train", "--algorithm", "grop"], "Did you mean 'grpo'"),
        (["train", "Sort", "--ppo.lr", "-1"], "lmgym: lr=-1.0 must be at least 0"),
        (["train", "Sort", "--seed", "-1"], "--seed -1 is negative"),
        (["train", "Sort", "--max-kl", "nan"], "nan"),
        (["evaluate", "."], "no config.json"),
        (["train", "Sort", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["train", "Sort", "--reward", "no/such/folder"], "no reward model 'no/such/folder'"),
        (["train", "Sort", "--reward", "C:\\runs\\reward"], "no reward model 'C:"),
        (["train", "Sort", "--reward", "run_10:30"], "no reward model 'run_10:30'"),
        (["train", "Sort", "--reward", "my.py:"], "no function 'my.py:'"),
        (["train", "--preferences", "missing.jsonl"], "missing.jsonl"),
        (["train", "--prompts", "missing.jsonl", "--gold", "math:fsum"], "missing.jsonl"),
        (["train", "--gold", "math:fsum"], "--prompts"),
        (["train", "--prompts", "x.txt", "--gold", "math:nothing"], "math:nothing"),
        (["reward", "--preferences", "missing.jsonl"], "missing.jsonl"),
        (["report", "no/such/run"], "no/such/run"),
        (["report"], "give the folder of one"),
        (["evaluate", "Sort", "--policy", "no/such/policy"], "no/such/policy"),
    ],
)
def test_bad_input_gets_one_line_that_says_what_to_do(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("lmgym: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "bad input must leave nothing behind"


def test_an_unknown_option_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--ppo.updatse", "3"])
    assert stopped.value.code == 2
    assert "--ppo.updates" in capsys.readouterr().err


ALGORITHM = '''"""My own."""
from __future__ import annotations
from dataclasses import dataclass


@dataclass(frozen=True)
class Config:
    updates: int = 3
    """Rollouts, so many."""
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.rate > 1:
            raise ValueError(f"rate={self.rate} must be at most 1")


def train(policy, env, learner, config):
    yield {"score/mean": 0.0}
'''


@pytest.mark.parametrize("name", ["mine", "json"])
def test_an_algorithm_from_a_file_has_help_suggestions_and_checks(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the file has the name of a module that is already imported, which stays as it is."""
    (tmp_path / f"{name}.py").write_text(ALGORITHM)
    train = ["train", "Sort", "--algorithm", str(tmp_path / f"{name}.py")]
    before = sys.modules.get(name)
    assert cli.main([*train, "--help"]) == 0
    capsys.readouterr()
    for arguments, status in ((["--help-all"], 0), ([f"--{name}.updatse=1"], 2)):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*train, *arguments])
        said = capsys.readouterr()
        assert stopped.value.code == status
        assert f"--{name}.updates" in said.out + said.err
        assert "Rollouts, so many." in said.out + said.err
    assert cli.main([*train, f"--{name}.rate=2"]) == 2
    assert capsys.readouterr().err == "lmgym: rate=2.0 must be at most 1\n"
    assert name == "mine" or sys.modules.get(name) is before
    (tmp_path / f"{name}.py").write_text(ALGORITHM.replace("rate: float", "rate: Missing"))
    assert cli.main(train) == 2
    assert "name 'Missing' is not defined" in capsys.readouterr().err


def test_a_folder_that_holds_another_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["train", "Sort", "--out", str(tmp_path)]) == 2
    assert "holds another run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_envs_lists_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envs"]) == 0
    assert "lmgym/Sentiment-v0" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "sentiment"
    assert cli.main(["train", "Sentiment", "--out", str(out), "--profile", *QUICK]) == 0
    return out


def test_a_run_leaves_what_it_promises(finished_run: Path) -> None:
    files = {path.name for path in finished_run.iterdir()}
    assert files >= {
        "config.json", "metrics.jsonl", "evaluation.json", "samples.jsonl", "preferences.jsonl", "report.html",
        "sft", "policy", "reward_model", "tensorboard",
    }  # fmt: skip
    config = json.loads((finished_run / "config.json").read_text())
    assert config["versions"]["torch"]
    assert config["options"]["options"]["ppo"]["updates"] == 2
    stages = {json.loads(line)["stage"] for line in (finished_run / "metrics.jsonl").read_text().splitlines()}
    assert stages >= {"sft", "reward_model", "ppo"}
    samples = [json.loads(line) for line in (finished_run / "samples.jsonl").read_text().splitlines()]
    before, after = samples[:2], samples[2:]
    assert [s["prompt"] for s in before] == [s["prompt"] for s in after]
    # Before the first step the policy is the reference: no token has any KL.
    assert all(abs(token["kl"]) < 1e-5 for sample in before for token in sample["tokens"])


def test_a_profile_says_where_the_time_of_an_update_goes(finished_run: Path) -> None:
    phases, operations = (finished_run / "profile.txt").read_text().split("\n\n", 1)
    table = {
        name: (float(spent), float(share.rstrip("%"))) for name, spent, _, share in map(str.split, phases.splitlines())
    }
    assert list(table) == [*PHASES, "other"]
    assert all(spent > 0 for name, (spent, _) in table.items() if name != "other"), "every phase was seen"
    assert sum(share for _, share in table.values()) == pytest.approx(100, abs=1)
    assert "aten::" in operations
    events = json.loads((finished_run / "profile.json").read_text())["traceEvents"]
    marked = {event["name"] for event in events if event.get("ph") == "X"}
    assert marked >= {f"lmgym/{name}" for name in PHASES}


def test_what_a_run_saved_loads_in_plain_peft_and_transformers(finished_run: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    import lmgym

    lm = lmgym.load(str(finished_run / "sft"))
    policy = lmgym.Policy.load(lm, finished_run / "policy")
    text = "We stayed at the old hotel for a week."
    ids = torch.tensor([lm.text.encode(text)])
    plain = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(finished_run / "sft"), str(finished_run / "policy")
    ).eval()
    with torch.no_grad():
        ours = policy.start(ids, torch.ones_like(ids)).logits
        torch.testing.assert_close(ours, plain(ids).logits[:, -1], atol=1e-5, rtol=1e-5)
    reward_model = lmgym.RewardModel.load(finished_run / "reward_model")
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "reward_model")
    classifier = AutoModelForSequenceClassification.from_pretrained(finished_run / "reward_model").eval()
    with torch.no_grad():
        theirs = classifier(**tokenizer([text + " It was fine." + tokenizer.eos_token], return_tensors="pt")).logits[
            :, 0
        ]
    torch.testing.assert_close(reward_model.score_texts([text + " It was fine."]), theirs, atol=1e-5, rtol=1e-5)


def test_single_stages_take_what_a_run_left(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, policy = str(finished_run / "sft"), str(finished_run / "policy")
    reward_model = str(finished_run / "reward_model")
    assert cli.main(["evaluate", "--model", model, "--policy", policy, "--reward", reward_model, "--count", "8"]) == 0
    assert cli.main(["sample", "--model", model, "--policy", policy, "--count", "2", "--prompt", "The room"]) == 0
    preferences = str(finished_run / "preferences.jsonl")
    assert cli.main(["reward", "--preferences", preferences, "--model", model, "--out", str(tmp_path / "reward")]) == 0
    assert cli.main(["sft", "Sort", "--examples", "32", "--out", str(tmp_path / "sft")]) == 0
    assert cli.main(["report", str(finished_run)]) == 0
    out = capsys.readouterr().out
    assert "gold" in out
    assert out.count("The room|") == 2
    assert (tmp_path / "sft" / "sft" / "model.safetensors").is_file()


def figures_of(report: EvaluationReport) -> dict[str, dict[str, float]]:
    """As evaluation.json holds them."""
    return {name: {"mean": figure.mean, "stderr": figure.stderr} for name, figure in report.figures.items()}


def test_evaluate_repeats_the_numbers_of_a_run(finished_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = json.loads((finished_run / "evaluation.json").read_text())["after"]
    for arguments in ([str(finished_run)], ["--policy", str(finished_run)]):
        report, _ = evaluate.measure(arguments)
        assert figures_of(report) == wanted, "the same bits"
    other, _ = evaluate.measure(["Sentiment", "--policy", str(finished_run), "--count=8", "--seed=1"])
    assert figures_of(other) != wanted, "explicit options override the run's"
    before = json.loads((finished_run / "evaluation.json").read_text())["before"]
    report, _ = evaluate.measure([str(finished_run), "--policy", "None"])
    assert figures_of(report) == {name: figure for name, figure in before.items() if not name.startswith("kl_")}
    assert cli.main(["evaluate", str(finished_run)]) == 0
    assert "in the run" in capsys.readouterr().out
    assert cli.main(["sample", str(finished_run), "--count=2", "--prompt=The room"]) == 0
    named = capsys.readouterr().out
    model, policy = str(finished_run / "sft"), str(finished_run / "policy")
    by_hand = ["sample", "--model", model, "--policy", policy, "--count=2", "--prompt=The room", QUICK[0]]
    assert cli.main(by_hand) == 0
    assert capsys.readouterr().out == named


def test_evaluate_repeats_a_run_with_its_own_prompts_temperature_and_algorithm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, scores, out = tmp_path / "prompts.txt", tmp_path / "scores.py", tmp_path / "run"
    prompts.write_text("".join(f"We saw film {n} in May.\n" for n in range(40)))
    scores.write_text("def short(prompts, completions):\n    return [-len(c.text) / 100 for c in completions]\n")
    arguments = ["--prompts", str(prompts), "--gold", f"{scores}:short", "--reward=task", "--algorithm=rloo"]
    arguments += ["--rloo.updates=1", "--rloo.rows=8", "--rloo.temperature=0.7", "--max-new-tokens=6", "--seed=3"]
    arguments += ["--sft.examples=0", "--test-prompts=8", "--samples=1", "--missing-eos-score=none"]
    assert cli.main(["train", *arguments, "--out", str(out)]) == 0
    assert not (out / "reward_model").exists()
    report, _ = evaluate.measure([str(out)])
    assert figures_of(report) == json.loads((out / "evaluation.json").read_text())["after"]
    (out / "policy").rename(out / "elsewhere")
    assert cli.main(["evaluate", str(out)]) == 2
    assert "is not finished" in capsys.readouterr().err
    assert cli.main(["evaluate", str(out), "--policy", str(out / "elsewhere")]) == 2


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        (None, "is damaged"),
        ("all of it", "does not record the command"),
        (["evaluate", "."], "does not record the command"),
        (["reward", "--preferences", "x"], "trains no policy"),
        (["train", "Sort"], "is not finished"),
        (["train", "--gold", "[redacted]"], "held a secret"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_a_folder_without_a_usable_run_gets_one_line(
    command: str,
    recorded: list[str] | str | None,
    said: str,
    finished_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = json.loads((finished_run / "config.json").read_text()) | {"arguments": recorded}
    (tmp_path / "config.json").write_text("{" if recorded is None else json.dumps(config))
    assert cli.main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_fine_tuned_run_is_measured_and_sampled_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "sft")
    assert cli.main(["sft", "Sort", "--examples=32", "--max-new-tokens=5", "--out", out]) == 0
    capsys.readouterr()
    report, run = evaluate.measure([out, "--count=8"])
    assert run is not None
    assert report.figures["tokens"].mean <= 5
    assert "kl_nats_per_sequence" not in report.figures, "it is its own reference"
    assert cli.main(["sample", out, "--count=3"]) == 0
    assert capsys.readouterr().out.count("|") == 3


def test_the_reward_task_pays_what_the_task_itself_scores(tmp_path: Path) -> None:
    """Sentiment has a gold score and no other: no reward model is trained."""
    assert setting_of(Common(), "default").score is None
    assert setting_of(Common(), "learned").score is None
    setting = setting_of(Common(), "task")
    assert setting.score is not None
    prompts, completions = [Prompt("The hotel")], [Completion(" was wonderful. We loved the room.")]
    assert setting.score(prompts, completions) == setting.task.gold(prompts, completions)
    assert setting.score(prompts, completions)[0] > 0
    out = tmp_path / "run"
    few = ["--ppo.updates=1", "--ppo.rows=4", "--sft.examples=0", "--test-prompts=4", "--samples=1"]
    assert cli.main(["train", "--reward=task", "--missing-eos-score=none", *few, "--out", str(out)]) == 0
    assert not (out / "reward_model").exists()
    assert not (out / "preferences.jsonl").exists()
    after = json.loads((out / "evaluation.json").read_text())["after"]
    assert after["score"] == after["gold"]
    prompts_file = tmp_path / "prompts.txt"
    prompts_file.write_text("".join(f"say {n}\n" for n in range(40)))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "say 1", "chosen": " 1", "rejected": " 2"}) + "\n")
    with pytest.raises(ValueError, match="--reward task pays the gold score"):
        setting_of(Common(prompts=str(prompts_file)), "task", preferences=str(pairs))


def test_prompts_of_your_own(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"text": f"We saw film {n} in May. It was good. We left early."}) + "\n" for n in range(40))
    )
    scores = tmp_path / "scores.py"
    scores.write_text("def short(prompts, completions):\n    return [-len(c.text) / 100 for c in completions]\n")
    out = tmp_path / "run"
    arguments = ["--prompts", str(prompts), "--opening-words", "6", "--gold", f"{scores}:short", "--out", str(out)]
    assert cli.main(["train", *arguments, *QUICK]) == 0
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("name", ["run_10:30", "a:b", "run:1/reward_model"])
def test_a_reward_folder_may_have_a_colon_in_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lmgym.RewardModel.load("tiny-reward").save(name)
    assert cli.main(["evaluate", "--reward", name, "--count", "2"]) == 0
