"""What looks like a key is not kept, and what does not is."""

import shlex
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmgym.io.redact import HIDDEN, redact, redact_all

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEF"
HEX = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "key",
    [
        f"hf_{LETTERS[:34]}",
        f"sk-{LETTERS}",
        f"sk-ant-api03-{LETTERS}-{LETTERS}_AA",
        f"sk-proj-{LETTERS}",
        f"sk_live_{LETTERS[:24]}",
        f"ghp_{LETTERS[:36]}",
        f"gho_{LETTERS[:36]}",
        f"github_pat_11ABCDEFG0_{LETTERS}",
        f"glpat-{LETTERS[:20]}",
        "AKIAIOSFODNN7EXAMPLE",
        "ASIAIOSFODNN7EXAMPLE",
        f"AIza{LETTERS[:35]}",
        "xoxb-123456789012-abcdefghij",
        f"pypi-{LETTERS}",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4fw",
    ],
)
@pytest.mark.parametrize("frame", ["{}", "lmgym train --x {} --y 1", "error at {}: refused", "'{}'", "a={}", '"{}",'])
def test_keys_that_show_what_they_are(frame: str, key: str) -> None:
    assert redact(frame.format(key)) == frame.format(HIDDEN)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("lmgym train --hf-token abc --seed 1", "lmgym train --hf-token [redacted] --seed 1"),
        ("--token=abc", "--token=[redacted]"),
        ("--my.api_key abc", "--my.api_key [redacted]"),
        ("--password 'two words' --seed 1", "--password '[redacted]' --seed 1"),
        ("--password 'it'\"'\"'s' --seed 1", "--password '[redacted]' --seed 1"),
        ("HF_TOKEN=abc WANDB_API_KEY=def lmgym train", "HF_TOKEN=[redacted] WANDB_API_KEY=[redacted] lmgym train"),
        ("AWS_SECRET_ACCESS_KEY=ab/cd+ef", "AWS_SECRET_ACCESS_KEY=[redacted]"),
        ("--env HF_TOKEN=abc", "--env HF_TOKEN=[redacted]"),
        (f"--run-key {HEX}", "--run-key [redacted]"),
        (f"wandb_key={HEX}", "wandb_key=[redacted]"),
        ("load(token='abc', x=1)", "load(token='[redacted]', x=1)"),
        ('{"api_key": "abc", "x": 1}', '{"api_key": "[redacted]", "x": 1}'),
        ('{"password": "a\\"b", "x": 1}', '{"password": "[redacted]", "x": 1}'),
        ("{'token': 'abc', 'pad_token': '<pad>'}", "{'token': '[redacted]', 'pad_token': '<pad>'}"),
        ("accessToken=abc", "accessToken=[redacted]"),
        ("https://me:hunter2@host/path", "https://[redacted]@host/path"),
        ("https://me:p@ss@host/a@b", "https://[redacted]@host/a@b"),
        ("https://onlytoken@host", "https://[redacted]@host"),
        ("https://host/x?token=abc&seed=1", "https://host/x?token=[redacted]&seed=1"),
        ("Authorization: Bearer abc.def-ghi", "Authorization: Bearer [redacted]"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [redacted]"),
        ("curl -H 'authorization: bearer abcdefgh'", "curl -H 'authorization: bearer [redacted]'"),
    ],
)
def test_values_of_secret_names(text: str, kept: str) -> None:
    assert redact(text) == kept


@pytest.mark.parametrize(
    "text",
    [
        "",
        "lmgym train Sentiment --preferences.prompts 600 --ppo.updates 20 --out runs/demo",
        "lmgym train --model HuggingFaceTB/SmolLM2-135M --pad-token '<|pad|>' --prompts stories.jsonl",
        'lmgym train --pad-token "<|pad|>" --max-new-tokens 48',
        "--pad_token=<|pad|> --eos-token '</s>' --stop-token END --kl-per-token 0.1 --next-token abc",
        "max_new_tokens=48 max_prompt_tokens=12 padToken=x token=5 token=None first_token=7 tokens=abc",
        "TokenAction(token=17, logp=-0.3)",
        "sorted(rows, key=len) key='name' --sort-key score",
        "the prompt 'my password is long' says: token by token, a secret: none",
        "git@github.com:somebody/repository.git and me@example.org",
        "https://huggingface.co/gpt2?x=1#y",
        "task-abcdefghijklmnopqrstuvwxyz disk-abcdefghijklmnopqrstuvwxyz risk_live_abcdefghijklmnopqrst",
        "--token --seed 5",
        "--gold my_scores.py:happy --track wandb",
        "revision 0123456789abcdef0123456789abcdef01234567",
        "C:\\Users\\me\\runs",
        "password=None secret= token=''",
    ],
)
def test_ordinary_texts_stay(text: str) -> None:
    assert redact(text) == text


def test_redact_all_goes_by_names_too() -> None:
    options = {
        "api_key": "abc", "pad_token": "<pad>", "seed": 1, "rate": 0.5, "none": None,
        "list": ["hf_abcdefghijklmnopqrstuv", {"password": "x", "token": None}], "pair": (1, "https://a:b@c"),
    }  # fmt: skip
    assert redact_all(options) == {
        "api_key": HIDDEN, "pad_token": "<pad>", "seed": 1, "rate": 0.5, "none": None,
        "list": [HIDDEN, {"password": HIDDEN, "token": None}], "pair": [1, f"https://{HIDDEN}@c"],
    }  # fmt: skip


PIECES = st.sampled_from(
    [
        "hf_", "sk-", "AKIA", "ghp_", "AIza", "eyJ", "Bearer ", "Authorization: Basic ", "token", "password",
        "key", "--",
        "=", ": ", " ", '"', "'", "@", "://", "/", "\\", HIDDEN, "[", "]", "&", "pad_", "api_", LETTERS[:20], HEX,
        "é\ud800",
    ]
)  # fmt: skip
TEXTS = st.text() | st.lists(PIECES | st.text(max_size=3), max_size=12).map("".join)


@given(TEXTS)
@example("AKIAABCDEFGHIJKLMNOPhf_abcdefghijklmnopqrstuv")
def test_never_raises_and_twice_is_once(text: str) -> None:
    once = redact(text)
    assert redact(once) == once


@given(TEXTS, st.sampled_from([f"hf_{LETTERS[:34]}", "AKIAIOSFODNN7EXAMPLE"]), TEXTS)
def test_a_key_is_found_wherever_it_stands(before: str, key: str, after: str) -> None:
    assert key not in redact(f"{before} {key} {after}")


@given(st.text(min_size=1).filter(lambda value: value.strip("\"'") and not value[0].isspace() and HIDDEN not in value))
def test_a_quoted_secret_is_found_whatever_it_is(value: str) -> None:
    """As `shlex.join` writes a command line."""
    if (
        value != "="
        and not value.startswith("-")
        and value.strip("\"'").lower()
        not in (
            "none",
            "null",
            "true",
            "false",
            "auto",
            "task",
        )
    ):
        command = redact(f"lmgym --api-key {shlex.quote(value)} --seed 1")
        assert "\n" in value or command in (f"lmgym --api-key {q}{HIDDEN}{q} --seed 1" for q in ("", "'"))


@given(st.lists(st.from_regex(r"--[a-z]{1,6}(-[a-z]{1,6})? [a-z0-9./]{1,8}", fullmatch=True), max_size=6))
def test_ordinary_options_stay(options: list[str]) -> None:
    command = " ".join(["lmgym train", *options])
    if not any(word in command for word in ("key", "token", "pass", "pwd", "secret", "cred", "auth")):
        assert redact(command) == command


@pytest.mark.parametrize(
    "piece",
    [
        "a-", "a ", "a=", "'", "'\\", "://", "a@", "token=", "--token ", "eyJ", "sk-", "hf_", "bearer ", "\\", "a", " ",
        '"token": "', "AKIA", "Authorization: Basic ", "[redacted]token=", "key=a", "A", "aA",
    ],
)  # fmt: skip
def test_no_text_takes_long(piece: str) -> None:
    text = piece * (100_000 // len(piece))
    began = time.process_time()
    redact(f"://{text}")
    redact(text)
    assert time.process_time() - began < 3
