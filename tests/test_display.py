"""What models, files and users write is shown as it is: it commands no terminal and marks nothing up."""

import io
import sys
import unicodedata
from pathlib import Path

import pytest
from rich.console import Console

import lmgym
from agents import cli
from agents.pipeline import load_algorithm as catalog
from agents.runs import Run
from lmgym import registry
from lmgym.io import printable
from lmgym.tasks import Sort

MARKUP = "[bold]x[/bold] [link=https://evil.example]y[/link] :smile: "
HOSTILE = MARKUP + "\x1b[31m\x1b]0;title\x07\x9b31m\r\b\u202eabc\u2028 \\[red]\\"
SHOWN = MARKUP + "�[31m�]0;title��31m���abc� \\[red]\\"


def test_printable_lets_no_command_through() -> None:
    """Every character there is: control, C1, marks of direction, invisible ones, halves, separators of lines."""
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(every)
    left = {unicodedata.category(c) for c in set(shown) - {"\n", "\t"}}
    assert not left & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert len(shown) == len(every), "one for one, so that nothing vanishes"
    for mark in "\r\b\x07\x1b\x7f\x85\x9b\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff\ud800":
        assert printable(mark) == "\ufffd"
    assert printable("a b\n\tä漢🙂") == "a b\n\tä漢🙂"
    assert printable(HOSTILE) == SHOWN


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_run_says_is_literal(tmp_path: Path, terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=300, color_system=None)
    with Run(tmp_path / "run", {}, console) as run:
        run.say(HOSTILE)
        for _ in run.track_stage("[bold]stage[/bold]", iter([{"loss": 1.0}] * 10), 10, {"loss": "loss"}):
            pass
    text = out.getvalue()
    assert SHOWN in text
    assert "[bold]stage[/bold]" in text
    if not terminal:
        assert not set("\x1b\x9b\r\b\u202e\x07") & set(text)


def test_errors_are_literal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(argv: object) -> int:
        raise ValueError(f"the completion {HOSTILE}")

    monkeypatch.setattr("agents.cli.envs.run", fail)
    assert cli.main(["envs"]) == 2
    assert capsys.readouterr().err == f"lmgym: the completion {SHOWN}\n"


@pytest.mark.parametrize("command", ["nothing\x1b[31m", "\u202eabc"])
def test_an_unknown_command_is_literal(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command]) == 2
    assert not set("\x1b\u202e") & set(capsys.readouterr().err)


def test_what_other_packages_register_is_literal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(registry.TASK_SPECS, "x", registry.TaskSpec("x\x1b", "m:x", HOSTILE))
    assert cli.main(["envs"]) == 0
    assert SHOWN in capsys.readouterr().out
    (tmp_path / "hostile_algorithm.py").write_text(f'"""{HOSTILE.encode("unicode_escape").decode()}"""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(catalog, "available", lambda: {"\x1bmine": "hostile_algorithm"})
    assert cli.main(["algorithms"]) == 0
    out = capsys.readouterr().out
    assert not set("\x1b\x9b\r\b\u202e\x07\u2028") & set(out)
    assert "[link=https://evil.example]" in out


@pytest.mark.parametrize("line", [["envs", "--\x1b[31m"], ["sample", "--seed", "\u202ex"], ["sft", "--seed=\x1b[31m"]])
def test_complaints_about_a_line_are_literal(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert "\ufffd" in said.err
    assert "\x1b[31m" not in said.err
    assert "\u202e" not in said.err


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize("line", [["algorithms"], ["envs"], ["--help"], ["train", "--help"], ["evaluate", "--count=2"]])
def test_a_console_of_any_encoding_ends_nothing(
    encoding: str, line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A console of Windows or of a container: what it cannot show becomes a question mark."""
    written = {name: io.BytesIO() for name in ("stdout", "stderr")}
    for name, raw in written.items():
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding, errors="strict", write_through=True))
    monkeypatch.setattr(catalog, "available", lambda: {"β": "agents.best_of_n"})
    status = cli.main(line)
    said = written["stderr"].getvalue().decode(encoding)
    assert status == 0, said
    assert written["stdout"].getvalue()


def test_texts_that_a_console_cannot_encode_are_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True))
    env = lmgym.TokenVectorEnv(1, task=Sort(), model=lmgym.load("tiny"), render_mode="human")
    env.reset(options={"prompt": "a β ="})
    assert b"a ? =" in raw.getvalue()
