"""Chat models on the command line: train, sample and talk, from a folder and a file of questions."""

import io
import json
from pathlib import Path

import pytest
from chat_templates import tokenizer_of
from test_chat import model_of

from agents.cli import main


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
    line = ["train", "--model", str(folder / "model"), "--chat", "--prompts", str(folder / "questions.jsonl")]
    assert main([*line, "--reward", f"{folder / 'my.py'}:score", *SMALL, "--out", "run"]) == 0
    assert "sft: skipped, because the conversations have no answers" in capsys.readouterr().out
    samples = [json.loads(row) for row in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row["prompt"].startswith("What is") for row in samples)
    # The run's own policy answers.
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n\nHello\nAgain\n"))
    assert main(["chat", "run"]) == 0
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
    assert tokenizer_of("chatml").chat_template
