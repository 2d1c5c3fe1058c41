"""What a run leaves can be used without lmgym, moved, merged, uploaded and continued from."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lmgym
from agents import cli
from agents.cli import push
from agents.cli.finished import FinishedRun
from agents.pipeline import RLOptions, Setting, build_training
from agents.runs import model_card, write_cards
from agents.runs.compare import compare
from lmgym import RewardModel
from lmgym.models import read_checksum, weights_checksum
from lmgym.tasks import Sort

pytestmark = pytest.mark.timeout(400)
RL = ["--ppo.updates=2", "--ppo.rows=8", "--ppo.epochs=2", "--ppo.lr=1e-2", "--test-prompts=8", "--samples=1"]
TRAIN = ["train", "Sort", "--sft.examples=32", "--sft.test-examples=8", "--sft.lr=5e-3", "--ppo.critic=adapter", *RL]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sort"
    assert cli.main([*TRAIN, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy in another place, as after a move; the original is hidden meanwhile."""
    folder = tmp_path / "moved"
    shutil.copytree(finished, folder)
    aside = finished.rename(finished.with_name("hidden"))
    yield folder
    aside.rename(finished)


IDS = torch.tensor([[20, 31, 42, 53, 64]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS, use_cache=False).logits


def policy_logits(run: Path, policy: str = "policy") -> Tensor:
    """By plain peft, on the base that is given explicitly."""
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run / "sft"), str(run / policy)))


def base_of(folder: Path) -> str:
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


# What the folder holds ------------------------------------------------------------------------------------------------


def test_a_run_names_the_base_of_everything_it_saved(finished: Path) -> None:
    checksum = weights_checksum(lmgym.load(str(finished / "sft")).model)
    for name in ("policy", "policy_best", "policy/value", "policy_best/value"):
        assert base_of(finished / name) == str(finished.absolute() / "sft")
        assert read_checksum(finished / name) == checksum
    alone = AutoPeftModelForCausalLM.from_pretrained(finished / "policy")
    torch.testing.assert_close(logits(alone), policy_logits(finished), atol=1e-5, rtol=0)
    on_the_untouched = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(Path(lmgym.__file__).parent / "assets" / "tiny"), str(finished / "policy")
    )
    assert float((logits(on_the_untouched) - policy_logits(finished)).abs().max()) > 0.1, "fine-tuning must matter"


def test_the_cards_say_what_the_models_are(finished: Path) -> None:
    cards = {name: ModelCard.load(finished / name / "README.md") for name in ("sft", "policy", "policy_best")}
    data = {name: card.data.to_dict() for name, card in cards.items()}
    assert {d["base_model"] for d in data.values()} == {"tiny"}
    assert [d["library_name"] for d in data.values()] == ["transformers", "peft", "peft"]
    assert data["policy"]["tags"] == ["lmgym", "reinforcement-learning", "ppo", "lora"]
    assert data["sft"]["tags"] == ["lmgym", "sft"]
    text = cards["policy"].text
    evaluation = json.loads((finished / "evaluation.json").read_text())
    for name, said in (("score", "score that the policy is paid"), ("kl_nats_per_sequence", "KL to the reference")):
        cells = next(line for line in text.splitlines() if line.startswith(f"| {said}")).split("|")[2:4]
        for cell, when in zip(cells, ("before", "after"), strict=True):
            mean, low, high = map(float, cell.replace("[", "").replace("]", "").replace(",", "").split())
            figure = evaluation[when][name]
            assert mean == pytest.approx(figure["mean"], abs=6e-4)
            assert low == pytest.approx(figure["mean"] - 1.96 * figure["stderr"], abs=6e-4)
            assert high == pytest.approx(figure["mean"] + 1.96 * figure["stderr"], abs=6e-4)
    for fact in (
        "**Task**: sort",
        "**β**: 0.08",
        "**Algorithm**: ppo",
        "32 demonstrations",
        "## Licence",
        "lmgym train",
    ):
        assert fact in text
    assert "KL" not in cards["sft"].text
    assert str(finished) not in text.replace(json.loads((finished / "config.json").read_text())["command"], "")
    best = cards["policy_best"].text
    assert "figures below are those of the last update" in best
    # The code in a card is what it takes.
    code = text.split("```python")[1].split("```")[0].replace('"policy"', repr(str(finished / "policy")))
    names: dict[str, Any] = {}
    exec(code, names)
    torch.testing.assert_close(logits(names["model"]), policy_logits(finished), atol=1e-5, rtol=0)
    assert names["tokenizer"].decode([20]) == lmgym.load("tiny").text.decode([20])


def test_a_card_that_was_edited_stays(run: Path) -> None:
    assert write_cards(run) == []
    (run / "policy" / "README.md").write_text("mine")
    (run / "sft" / "README.md").unlink()
    assert write_cards(run) == [run / "sft" / "README.md"]
    assert (run / "policy" / "README.md").read_text() == "mine"


def test_a_card_quotes_what_may_be_hostile(run: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    config |= {
        "model": 'a "model":\n---\n# \x1b[31m',
        "command": "lmgym\n```\n# head",
        "task": "one\ntwo",
        "options": [],
    }
    (run / "config.json").write_text(json.dumps(config))
    (run / "evaluation.json").write_text("[]")
    for model in ("sft", "policy", "merged", "reward_model"):
        card = model_card(run, model)
        assert "\x1b" not in card
        assert "\n    # head\n" in card
        assert ModelCard(card).data.to_dict()["library_name"]
        assert "one two" in card


def test_two_runs_are_compared_without_what_depends_on_their_place(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    shutil.copytree(finished, again)
    assert cli.main(["relocate", str(again)]) == 0
    (again / "policy" / "README.md").write_text("mine")
    assert base_of(again / "policy") != base_of(finished / "policy")
    assert all(compare(finished, again).values())
    settings = json.loads((again / "policy" / "adapter_config.json").read_text())
    (again / "policy" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    (again / "policy_best" / "adapter_model.safetensors").write_bytes(b"")
    (again / "sft" / "more.json").write_text("{}")
    assert {name for name, same in compare(finished, again).items() if not same} == {"policy", "policy_best", "sft"}


# Moving and merging ---------------------------------------------------------------------------------------------------


def test_a_moved_run_is_relocated(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not Path(base_of(run / "policy")).exists()
    assert cli.main(["sample", "Sort", "--model", str(run / "policy"), "--count=2", "--prompt=bca"]) == 0
    by_adapter = capsys.readouterr().out
    assert cli.main(["sample", str(run), "--count=2", "--prompt=bca"]) == 0
    assert capsys.readouterr().out == by_adapter
    assert cli.main(["relocate", str(run)]) == 0
    assert capsys.readouterr().out.count(f"base {run / 'sft'}") == 4
    alone = AutoPeftModelForCausalLM.from_pretrained(run / "policy")
    torch.testing.assert_close(logits(alone), policy_logits(run), atol=1e-5, rtol=0)


def test_a_folder_inside_of_a_run_and_a_run_instead_of_its_model_are_named(run: Path, capsys) -> None:
    """Whoever gives the wrong one of two folders is told the right one."""
    for line in (["sample"], ["evaluate"], ["relocate"], ["repeat"], ["train", "--resume"], ["sample", "--policy"]):
        assert cli.main([*line, str(run / "sft")]) == 2
        said = capsys.readouterr().err
        assert (
            f"'{run / 'sft'}' is the folder of a model, not of a run: give the run that it belongs to, '{run}'" in said
        )
    assert cli.main(["merge", str(run / "policy"), str(run / "out")]) == 2
    assert f"give the run that it belongs to, '{run}'" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"the folder of a run: give one of the models in it, {run / 'policy'} or"):
        lmgym.load(str(run))
    with pytest.raises(ValueError, match="the folder of a run: give one of the models in it"):
        RewardModel.load(run)
    with pytest.raises(ValueError, match=f"give the policy of this run, {run / 'policy'}"):
        lmgym.load(str(run / "sft")).adapters.load(run)


def test_relocate_refuses_what_does_not_belong_together(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lm = lmgym.load("tiny")
    shutil.rmtree(run / "sft")
    lm.save(run / "sft")
    before = base_of(run / "policy")
    assert cli.main(["relocate", str(run)]) == 2
    assert "other weights" in capsys.readouterr().err
    assert base_of(run / "policy") == before
    shutil.rmtree(run / "sft")
    assert cli.main(["relocate", str(run)]) == 2
    assert "needs the folders sft and policy" in capsys.readouterr().err
    assert cli.main(["relocate", str(run / "policy")]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_relocate_gives_an_older_run_its_base_and_checksum(run: Path) -> None:
    for folder in ("policy", "policy/value"):
        (run / folder / "lmgym.json").unlink()
    assert cli.main(["relocate", str(run)]) == 0
    assert read_checksum(run / "policy") == read_checksum(run / "policy/value") == read_checksum(run / "policy_best")


@pytest.mark.parametrize("policy", ["policy", "policy_best"])
def test_a_merged_run_is_one_plain_model(
    run: Path, policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "merged"
    assert cli.main(["merge", str(run), str(out), "--policy", policy]) == 0
    assert not (out / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits(plain), policy_logits(run, policy), atol=5e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(out).decode([20]) == lmgym.load("tiny").text.decode([20])
    assert ModelCard.load(out / "README.md").data.to_dict()["library_name"] == "transformers"
    capsys.readouterr()
    assert cli.main(["sample", "--model", str(out), "--count=2", "--prompt=bca"]) == 0
    by_model = capsys.readouterr().out
    assert cli.main(["sample", "--model", str(run / policy), "--count=2", "--prompt=bca"]) == 0
    assert capsys.readouterr().out == by_model
    # What is there stays.
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert cli.main(["merge", str(run), str(out)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert cli.main(["merge", str(run), str(run / "config.json")]) == 2
    assert cli.main(["merge", str(run / "sft"), str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
    (tmp_path / "empty").mkdir()
    assert cli.main(["merge", str(run), str(tmp_path / "empty"), "--dtype=bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "empty").dtype == torch.bfloat16
    shutil.rmtree(run / "policy_best")
    assert cli.main(["merge", str(run), str(tmp_path / "y"), "--policy=policy_best"]) == 2
    assert "has no folder 'policy_best'" in capsys.readouterr().err


# Continuing -----------------------------------------------------------------------------------------------------------


def test_training_continues_from_an_adapter(run: Path, tmp_path: Path) -> None:
    """Without a step, the policy is the adapter's; the reference is the base, so KL starts where it ended."""
    out = tmp_path / "next"
    still = ["--ppo.lr=0", "--ppo.updates=1", "--ppo.rows=8", "--test-prompts=8", "--samples=1"]
    assert cli.main(["train", "Sort", "--from-adapter", str(run), *still, "--out", str(out)]) == 0
    torch.testing.assert_close(policy_logits(out), policy_logits(run), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(out / "sft")),
        logits(AutoModelForCausalLM.from_pretrained(run / "sft")),
        atol=0,
        rtol=0,
    )
    assert base_of(out / "policy") == str(out / "sft")
    ended, began = (json.loads((folder / "evaluation.json").read_text()) for folder in (run, out))
    for name in ("score", "kl_exact_nats_per_sequence"):
        assert began["before"][name]["mean"] == pytest.approx(ended["after"][name]["mean"], abs=1e-5)
    assert abs(began["before"]["kl_exact_nats_per_sequence"]["mean"]) > 1e-3
    config = json.loads((out / "config.json").read_text())
    assert config["model"] == str(run / "sft")
    assert {str(run / "policy"), str(run / "sft")} <= config["inputs"].keys()


@pytest.mark.slow
def test_a_run_from_an_adapter_resumes_with_the_same_bits(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_survival import at, terminate

    arguments = ["train", "Sort", "--from-adapter", str(run / "policy"), *RL, "--out"]
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 0
    at(monkeypatch, "ppo", 1, terminate)
    assert cli.main([*arguments, str(tmp_path / "cut")]) == 143
    assert cli.main(["train", "--resume", str(tmp_path / "cut")]) == 0
    assert all(compare(tmp_path / "whole", tmp_path / "cut").values())
    assert float((policy_logits(tmp_path / "whole") - policy_logits(run)).abs().max()) > 1e-3, "it must learn"


def test_the_copy_keeps_rank_and_modules(run: Path) -> None:
    lm = lmgym.load(str(run / "sft"))
    lm.adapters.add("policy", rank=3, targets="attention", layers=1)
    lm.adapters.save(run / "small", "policy")
    wanted = {name: p.shape for name, p in lm.model.named_parameters() if "lora_" in name}
    again = lmgym.load(str(run / "sft"))
    setting = Setting(Sort(), again, {"max_new_tokens": 4}, from_adapter=str(run / "small"))
    policy = build_training(setting, RLOptions(lora_rank=8)).policy
    assert policy.lm.adapters.rank("policy") == 3
    assert {name: p.shape for name, p in again.model.named_parameters() if "lora_" in name} == wanted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model=tiny"], "other weights"),
        (["--sft.examples=10"], "--sft.examples would change the base"),
        (["--ppo.lora-rank=4"], "keeps its rank, 8"),
    ],
)
def test_what_contradicts_the_adapter_is_refused(
    run: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "next"
    assert cli.main(["train", "Sort", "--from-adapter", str(run), *options, "--out", str(out)]) == 2
    assert said in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(["train", "Sort", "--from-adapter", str(run / "sft"), "--out", str(out)]) == 2
    assert "no adapter in" in capsys.readouterr().err


# Uploading ------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Enough of the hub for huggingface_hub's own client: makes repositories, and takes commits."""

    repositories: dict[str, dict[str, bytes]] = {}
    private: dict[str, bool] = {}
    status = 200

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        assert self.headers["Authorization"] == "Bearer hf_test"
        if self.status != 200:
            self.answer({"error": "You shall not pass"}, self.status)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            self.repositories.setdefault(name, {})
            self.private[name] = wanted.get("private", wanted.get("visibility") == "private")
            self.answer({"url": f"http://{self.headers['Host']}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in files]})
        else:
            name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/{name}/commit/0", "commitOid": "0" * 40})

    def do_GET(self) -> None:
        self.answer({"error": "not here"}, 404)

    def answer(self, data: Any, status: int = 200) -> None:
        raw = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, and the client pointed to it."""
    made = type("OneHub", (Hub,), {"repositories": {}, "private": {}})
    server = HTTPServer(("127.0.0.1", 0), made)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def download(hub: type[Hub], name: str, folder: Path) -> Path:
    for path, content in hub.repositories[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def test_a_policy_is_uploaded_with_its_base(
    run: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = policy_logits(run)
    card = (run / "policy" / "README.md").read_text().replace("# license: fill in", "license: mit  #")
    (run / "policy" / "README.md").write_text(card)
    assert cli.main(["push", str(run), "--to", "someone/sorter"]) == 0
    out = capsys.readouterr().out
    assert hub.repositories.keys() == {"someone/sorter", "someone/sorter-base"}
    assert all(name in out for name in hub.repositories)
    assert all(hub.private.values())
    adapter = download(hub, "someone/sorter", tmp_path / "adapter")
    base = download(hub, "someone/sorter-base", tmp_path / "base")
    assert base_of(adapter) == base_of(adapter / "value") == "someone/sorter-base"
    assert str(run) not in (adapter / "adapter_config.json").read_text()
    data = ModelCard.load(adapter / "README.md").data.to_dict()
    assert (data["base_model"], data["license"]) == ("someone/sorter-base", "mit")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    torch.testing.assert_close(logits(plain), wanted, atol=0, rtol=0)
    assert base_of(run / "policy") != "someone/sorter-base", "the run itself stays as it was"


def test_a_policy_is_uploaded_merged_or_onto_a_named_base(run: Path, tmp_path: Path, hub: type[Hub]) -> None:
    wanted = policy_logits(run)
    assert cli.main(["push", str(run), "--to", "someone/whole", "--merged", "--no-private"]) == 0
    assert hub.private == {"someone/whole": False}
    merged = download(hub, "someone/whole", tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(merged)), wanted, atol=5e-5, rtol=0)
    hub.repositories.clear()
    assert (
        cli.main(["push", str(run), "--to", "someone/adapter", "--base", "someone/base", "--policy=policy_best"]) == 0
    )
    assert hub.repositories.keys() == {"someone/adapter"}
    assert base_of(download(hub, "someone/adapter", tmp_path / "adapter")) == "someone/base"


def test_the_base_of_a_run_without_fine_tuning_is_named(run: Path) -> None:
    def wanted(examples: int = 0, **options: Any) -> FinishedRun:
        known = dict.fromkeys(("pad_token", "from_adapter", "chat_template", "template_options"))
        known |= {"model": "someone/model"} | options
        stages = SimpleNamespace(sft=SimpleNamespace(examples=examples))
        return FinishedRun(run, SimpleNamespace(options=stages, **known), 1, None)

    assert push._unchanged_base(wanted()) == "someone/model"
    changes: tuple[dict[str, Any], ...] = (
        {"model": "tiny"},
        {"model": ""},
        {"model": str(run)},
        {"pad_token": "<p>"},
        {"examples": 1},
        {"from_adapter": "x"},
        {"chat_template": "own.jinja"},
        {"template_options": '{"enable_thinking": false}'},
    )
    assert all(push._unchanged_base(wanted(**change)) is None for change in changes)


def test_an_upload_that_fails_says_what_to_do(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert cli.main(["push", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    arguments = [str(run), "--to", "someone/sorter"]
    assert "not the name of a repository: give user/name" in refused(str(run), "--to", "sorter")
    assert "no config.json" in refused(str(run / "policy"), "--to", "someone/sorter")
    for status, remedy in ((401, "hf auth login"), (403, "hf auth login"), (404, "another name")):
        monkeypatch.setattr(hub, "status", status)
        assert remedy in refused(*arguments)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "could not be reached" in refused(*arguments)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(*arguments)
    monkeypatch.setattr(push, "get_token", lambda: None)
    assert "set HF_TOKEN" in refused(*arguments)
    shutil.rmtree(run / "policy")
    assert "is not finished" in refused(*arguments)
    assert not hub.repositories
