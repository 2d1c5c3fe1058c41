"""Chat models on the command line: train, sample and talk, from a folder and a file of questions."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import tokenizer_of
from test_chat import model_of

from agents.cli import main, train
from agents.cli.names import setting_of
from agents.cli.options import parse
from agents.cli.sample import Sample
from lmgym.env import TokenVectorEnv
from lmgym.models import load
from lmgym.reward import RewardModel
from lmgym.tasks import Conversational, PromptList, Sort, prompts_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random chat model, 20 questions, and a score function."""
    path = tmp_path_factory.mktemp("chat")
    model_of("chatml").save(path / "model")
    rows = [{"prompt": f"What is {i} plus 3?", "answer": i + 3} for i in range(20)]
    (path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "my.py").write_text(
        "def score(prompts, completions):\n"
        "    assert all(p.messages[-1]['content'] == p.text for p in prompts)\n"
        "    return [float(str(p.data['answer']) in c.text) for p, c in zip(prompts, completions)]\n"
    )
    return path


SMALL = ["--ppo.updates", "1", "--ppo.rows", "8", "--test-prompts", "8", "--max-new-tokens", "5"]


def test_one_line_trains_a_chat_model_on_questions(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions.jsonl").write_bytes((folder / "questions.jsonl").read_bytes())
    line = ["train", "--model", str(folder / "model"), "--chat", "--prompts", "questions.jsonl"]
    assert main([*line, "--reward", f"{folder / 'my.py'}:score", *SMALL, "--out", "run"]) == 0
    assert "sft: skipped, because the conversations have no answers" in capsys.readouterr().out
    assert "**Fine-tuning**: none" in (tmp_path / "run" / "policy" / "README.md").read_text()
    samples = [json.loads(row) for row in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("What is") for row in samples)
    # The run's own policy answers, wherever its data are.
    monkeypatch.chdir(tmp_path.parent)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nHello\nAgain\n"))
    assert main(["chat", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert len(said) >= 3
    assert main(["sample", "run", "--count", "2", "--prompt", "Hello"]) == 0
    assert capsys.readouterr().out.count("Hello|") == 2


def test_an_empty_line_begins_a_new_conversation(folder: Path, capsys, monkeypatch) -> None:
    """The same seed and the same conversation give the same answer; the history changes it."""
    found = []
    for lines in ("Hello\n", "Hello\nHello\n", "Hi\nHello\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert main(["chat", "--model", str(folder / "model"), "--max-new-tokens", "3", "--temperature", "0.01"]) == 0
        found.append(capsys.readouterr().out)
    assert found[1].startswith(found[0])
    assert found[1] != found[0] * 2, "the second answer sees the first"


def test_a_finished_run_finds_its_files_from_another_folder(folder: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    start = tmp_path / "start"
    start.mkdir()
    for name in ("questions.jsonl", "my.py"):
        (start / name).write_bytes((folder / name).read_bytes())
    monkeypatch.chdir(start)
    line = ["train", "--model", str(folder / "model"), "--chat", "--prompts", "questions.jsonl"]
    assert main([*line, "--reward", "my.py:score", *SMALL, "--out", "runs/a"]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["sample", "start/runs/a", "--count", "1"]) == 0
    assert "What is" in capsys.readouterr().out
    assert main(["evaluate", "start/runs/a", "--count", "2"]) == 0
    (start / "my.py").unlink()
    assert main(["evaluate", "start/runs/a", "--count", "2"]) == 2
    assert "my.py" in capsys.readouterr().err


def test_a_conversation_that_outgrows_the_model_goes_on(folder: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n" + "word " * 2000 + "\nHello\n"))
    assert main(["chat", "--model", str(folder / "model"), "--max-new-tokens", "3"]) == 0
    first, refused, last = capsys.readouterr().out.splitlines()
    assert "not sent: the conversation would have" in refused
    assert first
    assert "not sent" not in last


def test_a_template_that_refuses_a_prompt_names_the_row(folder: Path, tmp_path: Path, capsys) -> None:
    rows = [{"prompt": f"What is {i}?"} for i in range(20)]
    rows[6]["prompt"] = "forbidden"
    template = "{% if messages[-1]['content'] == 'forbidden' %}{{ raise_exception('no') }}{% endif %}a"
    (tmp_path / "t.jinja").write_text(template)
    line = ["train", "--model", str(folder / "model"), "--chat", "--chat-template", str(tmp_path / "t.jinja")]
    prompts = write_rows(tmp_path / "q.jsonl", rows)
    assert (
        main([*line, "--prompts", prompts, "--reward", f"{folder / 'my.py'}:score", "--out", str(tmp_path / "r")]) == 2
    )
    assert "q.jsonl, line 7: the chat template" in capsys.readouterr().err


def test_a_prompt_budget_below_the_template_is_refused_before_training(folder: Path, tmp_path: Path, capsys) -> None:
    line = ["train", "Sort", "--model", str(folder / "model"), "--chat", "--max-prompt-tokens", "2"]
    assert main([*line, "--out", str(tmp_path / "r")]) == 2
    assert "--max-prompt-tokens is 2, but the chat template makes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "tiny", "--chat"], "has no chat template"),
        (["--template-options", "{"], "is not JSON"),
        (["--template-options", "[]"], "must be a JSON object"),
        (["--chat-template", "missing.jinja"], "give a Jinja file"),
    ],
)
def test_bad_chat_options_are_refused(options: list[str], reason: str, folder: Path, capsys) -> None:
    line = ["sample", "--model", str(folder / "model"), "--prompts", str(folder / "questions.jsonl"), *options]
    assert main(line) != 0
    assert reason in capsys.readouterr().err


def test_a_template_and_a_system_message_from_the_command_line(folder: Path, tmp_path: Path, capsys) -> None:
    """What the model reads is what the template writes: here it refuses a conversation without the instruction."""
    (tmp_path / "own.jinja").write_text(
        "{% if messages[0].content == 'Hello' %}x{% elif messages[0].content != 'Be brief.' or loud != [1] %}"
        "{{ raise_exception('wrong') }}{% endif %}a"
    )
    line = ["sample", "--model", str(folder / "model"), "--count", "1", "--prompts", str(folder / "questions.jsonl")]
    own = ["--chat-template", str(tmp_path / "own.jinja"), "--template-options", '{"loud": [1]}']
    assert main([*line, *own, "--system", "Be brief.", "--max-new-tokens", "2"]) == 0
    assert main([*line, *own, "--system", "Be long."]) != 0
    assert "refuses the conversation" in capsys.readouterr().err
    (tmp_path / "own.jinja").write_text("")
    assert main([*line, *own[:2], "--chat"]) == 2
    assert "the chat template of" in (said := capsys.readouterr().err)
    assert "writes nothing for [{'role': 'user'" in said
    assert tokenizer_of("chatml").chat_template


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fine_tuning_learns_from_the_rows_that_have_an_answer(folder: Path, tmp_path: Path, capsys) -> None:
    """The others are counted, in conversations as in texts and in tables, whose cells are empty."""
    ask = [[{"role": "user", "content": f"What is {i} plus 3?"}] for i in range(20)]
    rows = [
        {"messages": [*a, *([{"role": "assistant", "content": "five"}] if i < 15 else [])]} for i, a in enumerate(ask)
    ]
    texts = [{"prompt": f"What is {i}?", "demonstration": " five" if i < 5 else None} for i in range(20)]
    table = "prompt,demonstration\n" + "".join(f"What is {i}?,{' five' if i < 5 else ''}\n" for i in range(20))
    (tmp_path / "c.csv").write_text(table)
    files = [write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", texts), str(tmp_path / "c.csv")]
    for number, (file, without) in enumerate(zip(files, (5, 15, 15), strict=True)):
        line = ["sft", "--model", str(folder / "model"), "--prompts", file, "--examples=8", "--test-examples=2"]
        assert main([*line, "--out", str(tmp_path / f"run{number}")]) == 0
        assert f"{without} of 20 prompts have no demonstration: learning from the others" in capsys.readouterr().out
        assert (tmp_path / f"run{number}" / "metrics.jsonl").read_text().count("loss/train") == 1
    # Nothing is drawn that cannot be learned from, and a split may have nothing.
    task = PromptList.from_rows(texts, None)
    assert {prompt.data["demonstration"] for prompt in prompts_of(task.demonstrated()) or []} == {" five"}
    one = PromptList.from_rows(texts[:1], None, test_source=texts[6:8]).demonstrated()
    assert one.sample(np.random.default_rng(0)).data["demonstration"] == " five"
    with pytest.raises(NotImplementedError, match="'test' split"):
        one.sample(np.random.default_rng(0), "test")


def test_comparisons_are_conversations_where_prompts_are(folder: Path, tmp_path: Path, capsys) -> None:
    """Reward model, DPO and policy read the same prompts, with the same instruction."""
    rows = [{"prompt": f"What is {i} plus 3?", "chosen": "five", "rejected": "six"} for i in range(20)]
    pairs = write_rows(tmp_path / "pairs.jsonl", rows)
    line = ["--model", str(folder / "model"), "--prompts", str(folder / "questions.jsonl"), "--preferences", pairs]
    wanted, _ = train.parse_options(
        [*line, "--system", "Be brief.", "--test-preferences", pairs.replace("pairs", "held")]
    )
    write_rows(tmp_path / "held.jsonl", rows[:3])
    found = setting_of(wanted, "learned", wanted.preferences_file, test_preferences=wanted.test_preferences)
    assert found.comparisons
    assert found.held_out
    prompt = found.task.sample(np.random.default_rng(0))
    for comparison in (*found.comparisons, *found.held_out):
        assert [message["role"] for message in comparison.messages] == ["system", "user"]
        assert comparison.messages[0] == prompt.messages[0]
        assert comparison.messages[1]["content"] == comparison.prompt
    # The reward model of its own command reads them likewise.
    reward = ["reward", "--model", str(folder / "model"), "--preferences", pairs, "--epochs=1", "--lora-rank=0"]
    scores = []
    for number, own in enumerate(([], ["--chat"], ["--system", "Be brief."])):
        out = tmp_path / f"reward{number}"
        assert main([*reward, *own, "--out", str(out)]) == 0
        model = RewardModel.load(out / "reward_model")
        scores.append(model.score_texts(["What is 1?"]).item())
    assert len(set(scores)) == 3
    assert main([*reward, "--chat", "--model", "tiny", "--out", str(tmp_path / "no")]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_a_prompt_of_your_own_is_a_message_where_the_data_are_conversations(
    folder: Path, tmp_path: Path, capsys
) -> None:
    rows = [{"messages": [{"role": "user", "content": f"What is {i} plus 3?"}]} for i in range(20)]
    line = ["--model", str(folder / "model"), "--prompts", write_rows(tmp_path / "a.jsonl", rows)]
    wanted = parse("sample", Sample, line)
    task = setting_of(wanted, "default", scored=False).task
    question = {"role": "user", "content": "Hello"}
    assert task.prompt_from("Hello").messages == (question,)
    assert not Sort().prompt_from("Hello").messages
    instructed = Conversational(Sort(), "Be brief.")
    assert instructed.prompt_from("Hello").messages == ({"role": "system", "content": "Be brief."}, question)
    env = TokenVectorEnv(1, task=instructed, model=load(str(folder / "model")), kl="none", max_prompt_tokens=64)
    env.reset(seed=0, options={"prompt": "Hello"})
    assert env.prompts[0].messages[-1] == question
