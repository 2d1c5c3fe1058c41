"""The command line: what it prints, how fast, and what it says to bad input."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agents import cli
from agents.runs.profiling import PHASES

# Whole pipelines, on machines that may be busy.
pytestmark = pytest.mark.timeout(400)

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
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
        assert all(command in done.stdout for command in cli.COMMANDS)
        took.append(seconds)
    assert min(took) < 1.0


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
        (["train", "Sort", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["train", "Sort", "--reward", "no/such/folder"], "no reward model 'no/such/folder'"),
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
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir()), "bad input must leave nothing behind"


def test_an_unknown_option_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--ppo.updatse", "3"])
    assert stopped.value.code == 2
    assert "--ppo.updates" in capsys.readouterr().err


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
