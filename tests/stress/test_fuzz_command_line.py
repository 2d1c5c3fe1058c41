"""Command lines of anything: a message and status 0 or 2, never a traceback, and no file touched."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents import cli

pytestmark = [pytest.mark.stress, pytest.mark.timeout(300)]

OPTIONS = (
    "--model", "--pad-token", "--prompts", "--opening-words", "--gold", "--max-prompt-tokens", "--max-new-tokens",
    "--seed", "--long-prompts", "--missing-eos-score", "--device", "--dtype", "--threads", "--out", "--algorithm",
    "--preferences", "--reward", "--teacher", "--track", "--ppo.updates", "--ppo.lr", "--ppo.beta", "--sft.examples",
    "--temperature", "--count", "--prompt", "--policy", "--test-preferences", "--help", "-h", "--no-such-option",
    "--", "-", "--ppo.kl-loss", "--ppo", "--rloo.rows", "--preferences.prompts", "--samples", "--test-prompts", "--=",
    "--seed=", "---", "--options", "--reward.rank", "--help-all",
)  # fmt: skip
VALUES = (
    "", " ", "0", "1", "-1", "1e999", "nan", "None", "True", "Sort", "Sentiment", "no such", "no/such.py",
    "no/such:f", "a:b:c", ":", "math:fsum", "..", "/nowhere/at/all", "\x1b[31m", "\u202e", "[bold]", "[/]", "{}",
    "%s", "{0.__class__}", "\ud800", "é" * 300, "--seed", "cpu", "cuda", "bfloat16", "error", "none", "task", "wandb",
    "ppo", "rloo", "dpo", "x.jsonl", "x.txt", "9" * 400, "$HOME",
)  # fmt: skip
COUNTS = {
    "train": 40,
    "sft": 40,
    "preferences": 40,
    "reward": 40,
    "evaluate": 40,
    "sample": 40,
    "envs": 30,
    "report": 40,
}
COUNTS |= {"algorithms": 30, "": 30}


def random_line(rng: np.random.Generator, command: str) -> list[str]:
    words: list[str] = [command] if command else []
    for _ in range(rng.integers(6)):
        pick = rng.integers(4)
        option, value = OPTIONS[rng.integers(len(OPTIONS))], VALUES[rng.integers(len(VALUES))]
        words += [[option, value], [f"{option}={value}"], [value], [option]][pick]
    return words


@pytest.mark.parametrize("command", list(COUNTS))
def test_command_lines_of_anything(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: Any, **options: Any) -> Any:
        raise ValueError("parsed, and stopped before any work")

    monkeypatch.chdir(tmp_path)
    for name in ("train.setting_of", "sft.setting_of", "preferences.setting_of", "evaluate.setting_of"):
        monkeypatch.setattr(f"agents.cli.{name}", stop)
    for name in ("sample.setting_of", "reward.model_named", "folder.Run"):
        monkeypatch.setattr(f"agents.cli.{name}", stop)
    before = list(sys.path)
    ends: dict[str, int] = {}
    for number in range(COUNTS[command]):
        line = random_line(np.random.default_rng([number, len(command)]), command)
        try:
            status: Any = cli.main(line)
        except SystemExit as stopped:
            status = stopped.code
        except BaseException:
            print(f"lmgym {line}")
            raise
        out, error = capfd.readouterr()
        assert status in (0, 2), (line, status)
        assert (error if status else out + error).strip(), f"{line} says nothing"
        assert "Traceback" not in out + error, line
        assert "\x1b[31m" not in error, f"{line}: a command to the terminal came through"
        assert "\u202e" not in out + error, line
        kind = "parsed" if "parsed, and" in error else f"status {status}"
        ends[kind] = ends.get(kind, 0) + 1
        assert not list(tmp_path.iterdir()), f"{line} left a file"
    assert sys.path == before
    print(command, ends)
