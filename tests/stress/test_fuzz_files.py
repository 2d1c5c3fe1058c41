"""Ten thousand files of every kind of damage: each is read whole, or refused by name, line and remedy."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.report import read
from lmgym.io import read_jsonl
from lmgym.models import read_settings, read_weights
from lmgym.preferences import read_comparisons
from lmgym.tasks import PromptList

pytestmark = [pytest.mark.stress, pytest.mark.timeout(300)]

EVERY: Any = list(HealthCheck)

FILES = 10_000
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"prompt": "é 漢 🙂 שלום", "ranking": ["x", "y", "z"], "text": "one two three four"},
    {"prompt": "2 + 2 =", "answer": "4", "text": "a b\tc\u2028d e f", "chosen": "", "rejected": " "},
    {"prompt": "", "text": "word", "chosen": "x", "rejected": "x"},
    {"stage": "ppo", "step": 1, "score/mean": 0.5, "seconds": 2},
    {"prompt": None, "text": 5, "chosen": ["x"], "ranking": "xyz"},
    {"prompt": "<eos>", "text": "<pad> " * 9, "chosen": "\u0000", "rejected": "\u001b[31m"},
)
PIECES = (
    b"", b"\n", b"\r\n", b"\r", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\ud83d\\ude42",
    b"NaN", b"1e999", b"-Infinity", b"null", b"[]", b"{}", b"[" * 300, b'{"a":' * 300, b"9" * 5000, b'"', b"\\", b",",
    b":", b"}", b"{", b"]", b'{"prompt": "a"}', b'"prompt": "twice",', b"\xc3\x28", b"\xf0\x9f", b" ", b"\t",
    b"\x1b[2J", "\u2028\u2029\x85".encode(), b"a" * 2000,
)  # fmt: skip


def sound(number: int) -> dict[str, Any]:
    """A row that readers of prompts, openings and comparisons take, different for each number."""
    words = f"é{number} two\u2028three 漢 {number}"
    return {"prompt": f"p {number} \u2028", "text": words, "ranking": [f"{number}", "🙂", " "], "x": {"y": [number]}}


def damaged(rng: np.random.Generator, name: str) -> bytes:
    """A file of some rows, every second time of those that its reader takes; bytes changed, cut, doubled or put in."""
    rows = [ROWS[i] for i in rng.integers(len(ROWS), size=rng.integers(1, 6))]
    if rng.integers(2):
        rows = [sound(number) for number in range(rng.integers(1, 20))]
        rows = [{"stage": "s", "step": i, "x": None} for i in range(len(rows))] if name == "metrics" else rows
        sample = {"when": "after", "prompt": "a", "completion": "b", "tokens": [{"text": "c", "kl": 0.1}]}
        rows = [sample] * len(rows) if name == "samples" else rows[:1] if name == "settings" else rows
    data = bytearray("\n".join(json.dumps(row, ensure_ascii=bool(rng.integers(2))) for row in rows).encode())
    for _ in range(rng.integers(4)):
        at = int(rng.integers(len(data) + 1))
        match rng.integers(4):
            case 0:
                data[at:at] = PIECES[rng.integers(len(PIECES))]
            case 1:
                del data[at : at + int(rng.integers(1, 9))]
            case 2:
                data[at : at + 1] = bytes([rng.integers(256)])
            case 3:
                data[at:] = data[: int(rng.integers(len(data) + 1))]
    return bytes(data)


def lines_of(data: bytes) -> list[str]:
    """The lines that are not blank, as a reader of its own would have them."""
    texts = [raw.decode("utf-8-sig" if i == 0 else "utf-8").strip() for i, raw in enumerate(data.split(b"\n"))]
    return [text for text in texts if text]


def whole_rows(rows: Sequence[Any], data: bytes) -> bool:
    return list(rows) == [json.loads(line) for line in lines_of(data)]


def comparisons(path: Path) -> tuple[list[Any], list[str]]:
    said: list[str] = []
    return read_comparisons(path, as_written=True, say=said.append), said


def whole_comparisons(read: tuple[Sequence[Any], list[str]], data: bytes) -> bool:
    """Every row as it was; if some were left out or changed, that was said."""
    found, said = read
    rows = [json.loads(line) for line in lines_of(data)]
    if said:
        return len(found) <= len(rows) and all(f" of {len(rows)} rows " in message for message in said)
    texts = [(r["prompt"], *(r["ranking"] if "ranking" in r else (r["chosen"], r["rejected"]))) for r in rows]
    return texts == [(c.prompt, *c.ranked) for c in found]


def prompts_of(task: PromptList) -> list[str]:
    return sorted(prompt.text for prompts in task._prompts.values() for prompt in prompts)


def whole_prompts(task: Any, data: bytes) -> bool:
    return prompts_of(task) == sorted(json.loads(line)["prompt"] for line in lines_of(data))


def whole_openings(task: Any, data: bytes) -> bool:
    found = [prompt for prompts in task._prompts.values() for prompt in prompts]
    rows = [json.loads(line) for line in lines_of(data)]
    texts = [(row["prompt"] if row.get("text") is None else row["text"]).split() for row in rows]
    return sorted((prompt.text + prompt.data["demonstration"]).split() for prompt in found) == sorted(
        words for words in texts if len(words) > 2
    )


READERS: dict[str, tuple[Callable[[Path], Any], Callable[[Any, bytes], bool]]] = {
    "rows": (read_jsonl, whole_rows),
    "rows with a field": (lambda path: read_jsonl(path, ("prompt",)), whole_rows),
    "comparisons": (comparisons, whole_comparisons),
    "prompts": (lambda path: PromptList.from_rows(path, None), whole_prompts),
    "openings": (lambda path: PromptList.from_rows(path, None, opening_words=2, say=str), whole_openings),
    "lines": (
        lambda path: PromptList.from_rows(path, None),
        lambda task, data: prompts_of(task) == sorted(lines_of(data)),
    ),
    "settings": (read_settings, lambda value, data: value == json.loads(data)),
    "metrics": (
        lambda path: read.read_rows(path, read.check_metrics),
        lambda rows, data: len(rows) == len(lines_of(data)),
    ),
    "samples": (
        lambda path: read.read_rows(path, read.check_sample),
        lambda rows, data: len(rows) == len(lines_of(data)),
    ),
}


def check_refusal(error: Exception, path: Path) -> None:
    said = str(error)
    assert str(path) in said, f"it names the file: {said!r}"
    assert "\n" not in said, f"one line: {said!r}"
    assert len(said) < 1500, f"and a short one: {said[:200]!r}…"
    assert not {"\0", "\x1b"} & set(said)


def test_ten_thousand_files(tmp_path: Path) -> None:
    read, refused = dict.fromkeys(READERS, 0), dict.fromkeys(READERS, 0)
    names = list(READERS)
    for number in range(FILES):
        rng = np.random.default_rng([number, 1])
        name = names[number % len(names)]
        data = damaged(rng, name)
        path = tmp_path / ("file.txt" if name == "lines" else "file.jsonl")
        path.unlink(missing_ok=True)  # some file systems flush a file that is written over: ten times slower
        path.write_bytes(data)
        reader, is_whole = READERS[name]
        try:
            found = reader(path)
        except ValueError as error:
            check_refusal(error, path)
            refused[name] += 1
        else:
            assert is_whole(found, data), f"file {number} read as {name}: something was lost of {data!r}"
            read[name] += 1
        assert path.read_bytes() == data
    assert {p.name for p in tmp_path.iterdir()} == {"file.jsonl", "file.txt"}, "no other file was touched"
    print(f"\n{FILES} files: read whole {read}, refused {refused}")
    assert all(read.values()), "each reader has read some"
    assert all(refused.values()), "and refused some"


def test_damaged_weights(tmp_path: Path) -> None:
    """Any bit of the header, any cut: read as it was, or refused."""
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4)}, path)
    whole = path.read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for number in range(1000):
        data = bytearray(whole)
        if number % 2:
            at = int(rng.integers(len(data) - 40))
            data[at] ^= 1 << int(rng.integers(8))
        else:
            del data[int(rng.integers(len(data))) :]
        path.unlink()
        path.write_bytes(data)
        try:
            found = read_weights(path)
        except ValueError as error:
            check_refusal(error, path)
            refused += 1
        else:
            assert all(weight.isfinite().all() for weight in found.values())
    assert refused > 500


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
ROW = st.dictionaries(st.sampled_from(["prompt", "text", "chosen", "rejected", "ranking", "x", "demonstration"]), JSON)


@given(st.lists(ROW | JSON, max_size=4), st.sampled_from([None, 0, 1, 2, -1]), st.sampled_from(["prompt", "text", "x"]))
@settings(max_examples=400, suppress_health_check=EVERY)
def test_datasets_of_anything(rows: list[Any], opening_words: int | None, field: str) -> None:
    try:
        names = None if field == "prompt" else {field: "prompt" if opening_words is None else "text"}
        task = PromptList.from_rows(iter(rows), None, fields=names, opening_words=opening_words, say=str)
    except ValueError as error:
        said = str(error)
    else:
        said = f"dataset: {len(rows)} rows"
        assert len(prompts_of(task)) == len(rows) or (opening_words and len(prompts_of(task)) < len(rows))
    assert "dataset" in said or "opening_words" in said


@given(st.lists(ROW | JSON, min_size=1, max_size=4))
@settings(max_examples=300, suppress_health_check=EVERY)
def test_json_of_anything(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    """What is valid JSON comes back equal, or is refused by its line."""
    path = tmp_path_factory.getbasetemp() / "anything.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    for reader, _ in READERS.values():
        try:
            reader(path)
        except ValueError as error:
            check_refusal(error, path)
