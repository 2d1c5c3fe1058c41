"""Data as people have it: files of every kind, data sets, the hub; prompts and comparisons in every form."""

import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets as library
import pytest
from conftest import slow

from agents import cli
from agents.cli.options import field_names
from lmgym import Prompt
from lmgym.io import local_path, read_rows
from lmgym.preferences import Comparison, leave_out, read_comparisons
from lmgym.tasks import PromptList, transcript

datasets: Any = library
"""Untyped: its own annotations refuse what its documentation shows."""
ROWS = [{"prompt": f'word {i} é,\n"is"', "chosen": f" good {i}", "rejected": " bad"} for i in range(30)]
ASK = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def json_lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_table(path: Path, rows: list[dict[str, str]], opened: Callable[..., Any] = open) -> None:
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_rows(path: Path) -> None:
    """`ROWS`, as the name of the file says."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "csv" | "tsv":
            write_table(path, ROWS, opened)
        case "parquet":
            datasets.Dataset.from_list(ROWS).to_parquet(path)
        case "json":
            with opened(path, "wt") as file:
                json.dump(ROWS, file, indent=1)
        case "saved":
            datasets.Dataset.from_list(ROWS).save_to_disk(path)
        case "splits":
            parts = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:3])}
            datasets.DatasetDict(parts).save_to_disk(path)
        case _:
            with opened(path, "wt") as file:
                file.write(json_lines(ROWS))


KINDS = (
    "a.jsonl", "a.jsonl.gz", "a.ndjson", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.tsv", "a.parquet", "a.saved",
    "a.splits",
)  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name)
    found = list(read_rows(tmp_path / name))
    assert [row for _, row in found] == ROWS
    assert len({place for place, _ in found}) == len(ROWS)
    assert all(place.startswith(f"{tmp_path / name}, ") for place, _ in found)
    assert read_comparisons(str(tmp_path / name))[2] == Comparison(ROWS[2]["prompt"], (" good 2", " bad"))
    task = PromptList.from_rows(tmp_path / name, None)
    assert {p.text for own in task._prompts.values() for p in own} == {row["prompt"] for row in ROWS}


def test_training_on_a_test_split_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + {i}"} for i in range(30)]
    parts = {name: datasets.Dataset.from_list(rows) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    said: list[str] = []
    for source in ("", "::train", "::test"):
        PromptList.from_rows(f"{tmp_path / 'saved'}{source}", None, say=said.append)
    assert len(said) == 1
    assert "::test: four fifths of this test split are for training" in said[0]
    with pytest.raises(ValueError, match="no prompts to train"):
        PromptList.from_rows(
            f"{tmp_path / 'saved'}::train", None, test_source=f"{tmp_path / 'saved'}::test", say=said.append
        )


def test_rows_of_the_datasets_library_and_text_files(tmp_path: Path) -> None:
    assert [row for _, row in read_rows(datasets.Dataset.from_list(ROWS))] == ROWS
    assert [row for _, row in read_rows(datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)))] == ROWS
    (tmp_path / "a.txt").write_text("one\n\n two\n")
    assert [row for _, row in read_rows(tmp_path / "a.txt")] == [{"prompt": "one"}, {"prompt": "two"}]
    (tmp_path / "lines.json").write_text(json_lines(ROWS))
    assert [row for _, row in read_rows(tmp_path / "lines.json")] == ROWS
    (tmp_path / "really_gzip.jsonl").write_bytes(gzip.compress(json_lines(ROWS).encode()))
    assert [row for _, row in read_rows(tmp_path / "really_gzip.jsonl")] == ROWS


def test_tables_name_the_line_and_keep_long_values(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    long = "x" * 300_000
    limit = csv.field_size_limit()
    path.write_text(f'\ufeffprompt,chosen\n"two\nlines",b\n{long},c\n', encoding="utf-8")
    rows = list(read_rows(path))
    assert [place.rpartition(" ")[2] for place, _ in rows] == ["2", "4"]
    assert [row["prompt"] for _, row in rows] == ["two\nlines", long]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"a,b\n1,2\n3,4,5\n", "line 3: 3 values for the 2 columns"),
        ("a.csv", b"a,b\n1\n", "line 2: 1 values for the 2 columns"),
        ("a.csv", b"a,a\n1,2\n", "line 1: two columns have the same name"),
        ("a.csv", b'a,b\n1,2\n"open,2\n3,4\n', "line 3: malformed"),
        ("a.csv", b"a,b\n1,\xe9\n", "line 2: not UTF-8"),
        ("a.csv", b"a,b\n", "no rows"),
        ("a.json", b'[{"a": 1}, 5]', "row 2: not a mapping but int"),
        ("a.json", b'[{"a": 1},', "not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9)[:-9], "line [0-9]+: damaged gzip"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n{"a"\n'), "line 2: not JSON"),
        ("a.parquet", b"no table", "not a whole Parquet file"),
        ("a.xlsx", b"PK", "data of an unknown kind; give a file whose name ends in .jsonl"),
        ("prompts", b"{}", "data of an unknown kind"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # gzip writes the time into its bytes
)
def test_damaged_files_are_refused_by_name_and_line(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as error:
        list(read_rows(tmp_path / name))
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_with_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a data set that was downloaded from the hub; conversations in a table have fields that hold nothing."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    messages = [ASK, answer("Hi") | {"name": "bot"}]
    datasets.Dataset.from_list([{"messages": messages}] * 3).to_parquet(folder / "train-00000-of-00001.parquet")
    datasets.Dataset.from_list([{"messages": messages[:1]}]).to_parquet(folder / "test-00000-of-00001.parquet")
    assert [len(list(read_rows(f"{tmp_path / 'set'}{split}"))) for split in ("", "::train", "::test")] == [3, 3, 1]
    (row,) = {str(row) for _, row in read_rows(tmp_path / "set")}
    assert "'name': None" in row
    task = PromptList.from_rows(tmp_path / "set", None, test_source=[{"prompt": "x"}])
    assert task.prompts[0].messages == (ASK,)
    with pytest.raises(ValueError, match=r"set::dev: this data set cannot be loaded \(Unknown split"):
        list(read_rows(f"{tmp_path / 'set'}::dev"))


# The hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the hub is asked for; it has `ROWS` in its train split."""
    calls: list[Any] = []

    def load_dataset(*arguments: Any, split: Any) -> Any:
        calls.append((*arguments, split))
        whole = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:2]))
        return whole[split] if split else whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return calls


@pytest.mark.parametrize(
    ("name", "call", "rows"),
    [
        ("owner/name", ("owner/name", None, None), 30),
        ("owner/name:main", ("owner/name", "main", None), 30),
        ("owner/name:main:test", ("owner/name", "main", "test"), 2),
        ("owner/name::test", ("owner/name", None, "test"), 2),
    ],
)
def test_names_on_the_hub(asked: list[Any], name: str, call: tuple[Any, ...], rows: int) -> None:
    found = list(read_rows(name))
    assert asked == [call]
    assert len(found) == rows
    assert found[0] == (f"{name}, row 1", ROWS[0])


@pytest.mark.parametrize(
    "name",
    [
        "rows.jsonl",
        "data/rows.jsonl.gz",
        "data/rows.csv",
        "./data",
        "/no/such",
        "a/b/c",
        "here/rows",
        "rows",
        "~/x",
        "",
    ],
)
def test_a_missing_file_is_never_asked_of_the_hub(asked: list[Any], tmp_path: Path, name: str) -> None:
    (tmp_path / "here").mkdir()
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(read_rows(name))
    assert not asked


def test_splits_and_paths_with_colons(asked: list[Any], tmp_path: Path) -> None:
    write_rows(tmp_path / "a.splits")
    write_rows(tmp_path / "a.jsonl")
    assert len(list(read_rows("a.splits::test"))) == 3
    with pytest.raises(ValueError, match=r"no split 'dev'; it has \['train', 'test'\]"):
        list(read_rows("a.splits::dev"))
    with pytest.raises(ValueError, match="a saved data set has no configs"):
        list(read_rows("a.splits:test"))
    with pytest.raises(ValueError, match="is a file, which has no configs or splits"):
        list(read_rows("a.jsonl:main"))
    (tmp_path / "b:c.jsonl").write_text(json_lines(ROWS))
    assert len(list(read_rows("b:c.jsonl"))) == 30
    assert local_path("a.splits::test") == Path("a.splits")
    assert local_path("owner/name:main") is None
    assert not asked


def test_what_the_hub_says_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"owner/name: this data set on the Hugging Face hub cannot .*\(no route\)$"):
        list(read_rows("owner/name"))


@pytest.mark.parametrize(("package", "name"), [("datasets", "owner/name"), ("pyarrow", "a.parquet")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str, name: str) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{name}: .*pip install 'lmgym\[datasets\]'"):
        list(read_rows(name))


# Prompts ------------------------------------------------------------------------------------------------------------


def prompts_of(rows: list[Any]) -> list[Prompt]:
    return PromptList.from_rows(rows, None, test_source=[{"prompt": "held out"}])._prompts["train"]


@pytest.mark.parametrize(
    ("row", "messages", "demonstration"),
    [
        ({"messages": [ASK]}, (ASK,), None),
        ({"messages": [SYSTEM, ASK, answer("Hi")]}, (SYSTEM, ASK), "Hi"),
        ({"prompt": [ASK]}, (ASK,), None),
        ({"prompt": [ASK, answer("a"), ASK, answer("b")]}, (ASK, answer("a"), ASK), "b"),
        ({"prompt": "Hello", "messages": [ASK, answer("Hi")]}, (ASK,), "Hi"),
        ({"prompt": [ASK], "demonstration": [answer("Hi")]}, (ASK,), "Hi"),
        ({"messages": [ASK, answer("Hi")], "demonstration": "mine"}, (ASK,), "mine"),
        ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hello"}]},
         (SYSTEM, ASK), None),
        ({"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]}, (ASK,), "Hi"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}], "name": None}]}, (ASK,), None),
    ],
)  # fmt: skip
def test_conversations(row: dict[str, Any], messages: tuple[Any, ...], demonstration: str | None) -> None:
    (prompt,) = prompts_of([{**row, "answer": 4}])
    assert prompt.messages == messages
    assert prompt.text == transcript(messages)
    assert prompt.data.get("demonstration") == demonstration
    assert prompt.data["answer"] == 4


def test_texts_and_token_ids() -> None:
    (prompt,) = prompts_of([{"prompt": "a", "messages": [], "x": 1}])
    assert (prompt.text, prompt.messages) == ("a", ())
    (prompt,) = prompts_of([{"token_ids": [3, 4]}])
    assert prompt.token_ids == (3, 4)


def test_fields_have_other_names() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    names = {"instruction+input": "prompt", "output": "demonstration"}
    other = [row | {"instruction": "x"}]
    (prompt,) = PromptList.from_rows([row], None, fields=names, test_source=other)._prompts["train"]
    assert prompt.text == "Add.\n\n1 2"
    assert prompt.data == {**row, "demonstration": "3"}
    alone = [row | {"input": ""}, {"instruction": "Add.", "output": "3"}]
    for found in PromptList.from_rows(alone, None, fields=names, test_source=[row])._prompts["train"]:
        assert found.text == "Add."
    with_messages = [{"prompt": "text", "messages": [ASK]}]
    task = PromptList.from_rows(with_messages, None, fields={"prompt": "prompt"}, test_source=[{"prompt": "x"}])
    assert task._prompts["train"][0].text == "text", "the named field counts"


@pytest.mark.parametrize(
    ("row", "fields", "said"),
    [
        (
            {"question": "a"},
            None,
            r"row 2: no 'prompt' and no 'messages'; the row has the fields \['question'\].*--field",
        ),
        ({"text": "a"}, None, "row 2: .*give --opening-words"),
        ({"prompt": " "}, None, "row 2: 'prompt' is ' '; give a text that is not empty"),
        ({"prompt": 5}, None, "row 2: messages are 5"),
        ({"prompt": None}, None, "row 2: no 'prompt'"),
        ({"messages": []}, None, r"row 2: messages are \[\]"),
        ({"messages": [ASK, ASK]}, None, "row 2: message 2 has the role 'user' after 'user'"),
        ({"messages": [answer("a"), ASK]}, None, "row 2: message 1 has the role 'assistant' at the start"),
        ({"messages": [SYSTEM]}, None, "row 2: the last message has the role 'system'"),
        ({"messages": [{"role": "user", "content": ""}]}, None, r"row 2: message 1 \(role 'user'\) has the content ''"),
        ({"messages": ["Hello"]}, None, "row 2: message 1 is 'Hello'"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, None, "row 2: message 1 has the role 'narrator'"),
        ({"prompt": "a", "demonstration": [ASK]}, None, "row 2: .* is not an answer"),
        ({"prompt": "a"}, {"question": "prompt"}, r"row 1: no field 'question' to use as 'prompt'; .*\['prompt'"),
        ({"token_ids": [-1]}, None, "row 2: token_ids contain -1"),
    ],
)
def test_malformed_prompts_name_the_row(row: Any, fields: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^dataset, {said}"):
        PromptList.from_rows([{"prompt": "fine"}, row], None, fields=fields)


def test_openings_leave_out_short_texts_and_say_so() -> None:
    rows = [{"text": f"number {i} is a good one"} for i in range(60)] + [{"text": "too short"}] * 3
    with pytest.warns(UserWarning, match="dataset: 3 of 63 texts have at most 3 words"):
        task = PromptList.from_rows(rows, None, opening_words=3)
    prompt = task._prompts["train"][0]
    assert len(prompt.text.split()) == 3
    assert prompt.data["demonstration"] == " a good one"
    with pytest.raises(ValueError, match=r"all 63 texts have at most 6 words.*lower opening_words"):
        PromptList.from_rows(rows, None, opening_words=6)
    with pytest.raises(ValueError, match="row 1: no 'text' to take an opening from; the row has the fields"):
        PromptList.from_rows([{"story": "a b c"}], None, opening_words=1)
    with pytest.raises(ValueError, match="opening_words is 0"):
        PromptList.from_rows(rows, None, opening_words=0)


def test_test_prompts_of_your_own_are_never_trained_on() -> None:
    rows, held_out = [{"prompt": f"p{i}"} for i in range(40)], [{"prompt": f"p{i}"} for i in (3, 5, 99)]
    with pytest.warns(UserWarning, match="2 of 40 prompts are among the test prompts: not trained on"):
        task = PromptList.from_rows(rows, None, test_source=held_out)
    assert {p.text for p in task._prompts["test"]} == {"p3", "p5", "p99"}
    assert {p.text for p in task._prompts["train"]} == {f"p{i}" for i in range(40)} - {"p3", "p5"}
    with pytest.raises(ValueError, match="dataset: no prompts to train"):
        PromptList.from_rows(held_out, None, test_source=held_out, say=str)


# Comparisons --------------------------------------------------------------------------------------------------------

PLAIN = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PLAIN, ("p", "a", "b")),
        ({"prompt": "p", "ranking": ["a", "b", "c"]}, ("p", "a", "b", "c")),
        ({"prompt": "p", "chosen": [answer("a")], "rejected": [answer("b")]}, ("p", "a", "b")),
        ({"prompt": [ASK], "chosen": [answer("a")], "rejected": [answer("b")]}, ((ASK,), "a", "b")),
        ({"prompt": [ASK], "chosen": "a", "rejected": "b"}, ((ASK,), "a", "b")),
        ({"prompt": [ASK], "chosen": [ASK, answer("a")], "rejected": [ASK, answer("b")]}, ((ASK,), "a", "b")),
        ({"chosen": [SYSTEM, ASK, answer("a")], "rejected": [SYSTEM, ASK, answer("b")]}, ((SYSTEM, ASK), "a", "b")),
        ({"prompt": "Hello", "messages": [ASK, answer("a")], "chosen": [ASK, answer("a")],
          "rejected": [ASK, answer("b")], "score_chosen": 5, "score_rejected": 4}, ((ASK,), "a", "b")),
        ({"conversations": [{"from": "human", "value": "Hello"}], "chosen": {"from": "gpt", "value": "a"},
          "rejected": {"from": "gpt", "value": "b"}}, ((ASK,), "a", "b")),
        ({"prompt": "p", "responses": ["c", "a", "b"], "scores": [1, 3, 2]}, ("p", "a", "b", "c")),
        ({"prompt": "p", "responses": ["c", "a", "b"], "ranks": [3, 1, 2]}, ("p", "a", "b", "c")),
        ({"prompt": "p", "responses": ["c", "a", "b"], "ranking": [1, 2, 0]}, ("p", "a", "b", "c")),
        ({"prompt": "p", "completions": [{"response": "b", "overall_score": 4.5}, {"response": "a",
          "overall_score": 7}]}, ("p", "a", "b")),
        ({"prompt": "p", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}]}, ("p", "a", "b")),
        ({"prompt": "p", "generations": ["b", "a"], "ratings": ["1", "5.0"]}, ("p", "a", "b")),
        ({"prompt": "p", "response_0": "b", "response_1": "a", "better_response_id": 1}, ("p", "a", "b")),
        ({"prompt": "p", "response_1": "a", "response_2": "b", "preference": 1}, ("p", "a", "b")),
        ({"prompt": "p", "response_a": "b", "response_b": "a", "winner": "B"}, ("p", "a", "b")),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "label": 0}, ("p", "a", "b")),
        ({"conversation_a": [ASK, answer("b")], "conversation_b": [ASK, answer("a")], "winner": "model_b"},
         ((ASK,), "a", "b")),
    ],
)  # fmt: skip
def test_forms_of_comparisons(row: dict[str, Any], expected: tuple[Any, ...]) -> None:
    prompt, *ranked = expected
    (found,) = read_comparisons([row])
    assert found.ranked == tuple(ranked)
    assert (found.prompt if isinstance(prompt, str) else found.messages) == prompt
    assert found.messages == (() if isinstance(prompt, str) else prompt)


@pytest.mark.parametrize(
    ("texts", "prompt"),
    [
        (("\n\nHuman: q\n\nAssistant: I am", "\n\nHuman: q\n\nAssistant: I be"), "\n\nHuman: q\n\nAssistant:"),
        (("\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant: y", "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\n"
          "Assistant: z"), "\n\nHuman: q\n\nAssistant: x\n\nHuman: r\n\nAssistant:"),
        (("the cat runs", "the cow runs"), "the"),
        (("Q: hi", "Q: hi there"), "Q:"),
    ],
)  # fmt: skip
def test_prompts_that_are_the_common_beginning(texts: tuple[str, str], prompt: str) -> None:
    with pytest.warns(UserWarning, match="1 of 1 rows have no prompt"):
        (found,) = read_comparisons([{"chosen": texts[0], "rejected": texts[1]}])
    assert found.prompt == prompt
    assert tuple(found.prompt + text for text in found.ranked) == texts, "nothing is lost"


TIED = [
    PLAIN | {"rejected": "a"},
    PLAIN | {"margin": 0.0},
    PLAIN | {"margin": "0"},
    PLAIN | {"label": "tie"},
    PLAIN | {"score_chosen": 3, "score_rejected": 3},
    {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "tie (bothbad)"},
    {"prompt": "p", "response_0": "a", "response_1": "b", "preference": 0.5},
    {"prompt": "p", "responses": ["a", "b"], "scores": [2, 2]},
    {"chosen": [ASK, answer("a")], "rejected": [ASK, answer("a")]},
    {"chosen": "same", "rejected": "same"},
]


def test_ties_are_left_out_and_counted() -> None:
    with pytest.warns(UserWarning, match=f"dataset: {len(TIED)} of {len(TIED) + 1} rows are ties"):
        assert read_comparisons([*TIED, PLAIN]) == [Comparison("p", ("a", "b"))]
    with pytest.raises(ValueError, match=f"all {len(TIED)} rows are ties"):
        read_comparisons(TIED)
    with pytest.warns(UserWarning, match="1 of 1 rows rank some texts as equal"):
        (found,) = read_comparisons([{"prompt": "p", "responses": ["a", "b", "c"], "scores": [2, 2, 1]}])
    assert found.ranked == ("a", "c")


def test_texts_that_repeat_the_prompt() -> None:
    rows = [{"prompt": f"Q {i}? A:", "chosen": f"Q {i}? A: yes", "rejected": f"Q {i}? A: no"} for i in range(9)]
    said: list[str] = []
    found = read_comparisons([*rows, PLAIN], say=said.append)
    assert said == ["dataset: 9 of 10 rows hold texts that begin with the prompt: it is cut off them"]
    assert {c.ranked for c in found} == {(" yes", " no"), ("a", "b")}
    few = [*rows[:2], *[PLAIN] * 8]
    assert read_comparisons(few, say=str)[0].ranked == ("Q 0? A: yes", "Q 0? A: no"), "by chance, as it is"
    assert read_comparisons(rows, as_written=True)[0].ranked == ("Q 0? A: yes", "Q 0? A: no")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "p", "completion": "a", "label": True},
            r"these rows are unpaired \('completion' with a 'label', as",
        ),
        ({"prompt": "p", "chosen": "a"}, r"a comparison needs .* the row has the fields \['prompt', 'chosen'\]"),
        (
            {"chosen": "a b", "rejected": "c d"},
            r"no 'prompt'; the row has the fields \['chosen', 'rejected'\].*--field",
        ),
        ({"question": "q", "responses": ["I a", "I b"], "scores": [1, 2]}, "no 'prompt'; .*'question'"),
        ({"chosen": [ASK, answer("a"), ASK, answer("b")], "rejected": [ASK, answer("c")]}, "they have 3 and 1"),
        ({"chosen": [ASK, ASK, answer("a")], "rejected": [ASK, ASK, answer("b")]}, "'user' after 'user'"),
        ({"chosen": [answer("a")], "rejected": [answer("b")]}, "no 'prompt', and the messages"),
        ({"prompt": "p", "chosen": [answer("a")], "rejected": "b"}, "some answers are"),
        ({"prompt": "p", "responses": ["a", "b"]}, "nothing says which is better"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "2 responses and 1 scores: give one for each"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, "N/A"]}, "'scores' has 'N/A': give a finite number"),
        ({"prompt": "p", "responses": ["a", "b"], "ranking": [1, 2]}, "counted from 0"),
        ({"prompt": "p", "response_0": "a", "response_1": "b"}, "nothing says which"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "label": True}, "'label' is True: give '0' or '1'"),
        ({"prompt": "p", "response_a": "a", "response_b": "b", "winner": "c"}, "'winner' is 'c'"),
    ],
)
def test_malformed_comparisons_name_the_row(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^dataset, row 2: .*{said}"):
        read_comparisons([PLAIN, row])


def test_comparisons_with_other_names_and_held_out_ones() -> None:
    rows = [{"question": "q", "good": "a", "bad": "b"}]
    found = read_comparisons(rows, {"question": "prompt", "good": "chosen", "bad": "rejected"})
    assert found == [Comparison("q", ("a", "b"))]
    others = [Comparison("q", ("b", "a")), Comparison("q", ("a", "c"))]
    assert leave_out(others, found) == others[1:]
    with pytest.raises(ValueError, match="none is left"):
        leave_out(found, found)


# The command line ---------------------------------------------------------------------------------------------------


def test_fields_of_the_command_line() -> None:
    assert field_names(["question=prompt", "a+b=text"]) == {"question": "prompt", "a+b": "text"}
    for wrong in (["question"], ["=prompt"], ["a="], ["a=x", "b=x"], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match=f"--field {wrong[-1]}"):
            field_names(wrong)


def test_commands_read_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    questions = [{"question": f"word {i} is", "answer": f" {i}"} for i in range(20)]
    write_table(tmp_path / "train.csv", questions)
    (tmp_path / "test.jsonl").write_text(json_lines([*questions[:2], {"question": "held out is", "answer": " x"}]))
    common = ["--field", "question=prompt", "--field", "answer=demonstration", "--max-new-tokens=4"]
    files = ["--prompts", "train.csv", "--test-prompts-file", "test.jsonl"]
    assert cli.main(["sample", *files, *common, "--count=8"]) == 0
    said = capsys.readouterr()
    assert {line.partition("|")[0] for line in said.out.splitlines()} <= {"word 0 is", "word 1 is", "held out is"}
    assert said.err == "lmgym: train.csv: 2 of 20 prompts are among the test prompts: not trained on\n"
    assert cli.main(["sft", *files, *common, "--examples=4", "--test-examples=2", "--out=sft"]) == 0
    assert "test.jsonl" in json.loads((tmp_path / "sft" / "config.json").read_text())["inputs"]
    assert cli.main(["sample", "sft", "--count=1"]) == 0
    write_table(tmp_path / "other.tsv", [{"q": "other is"}, {"q": "that is"}])
    capsys.readouterr()
    other = ["--prompts", "other.tsv", "--field", "q=prompt", "--test-prompts-file", "test.jsonl"]
    assert cli.main(["sample", "sft", *other]) == 2
    assert "test.jsonl, line 1: no field 'q' to use as 'prompt'" in capsys.readouterr().err
    pairs = [{"question": f"word {i} is", "chosen": " good", "rejected": " bad" if i else " good"} for i in range(20)]
    with gzip.open(tmp_path / "pairs.jsonl.gz", "wt") as file:
        file.write(json_lines(pairs))
    (tmp_path / "held.jsonl").write_text(json_lines(pairs[1:3]))
    capsys.readouterr()
    own = ["--preferences", "pairs.jsonl.gz", "--test-preferences", "held.jsonl", "--field", "question=prompt"]
    assert cli.main(["reward", *own, "--epochs=1", "--out=reward"]) == 0
    said = capsys.readouterr()
    assert "1 of 20 rows are ties" in said.err
    assert "2 comparisons are in held.jsonl too: not trained on" in said.err
    assert "on 2 held-out pairs" in said.out + said.err


def test_a_reward_model_of_conversations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    words = ("The film was", "The hotel was", "The food was")
    rows = [
        {"chosen": [ask, answer(f"good {i}")], "rejected": [ask, answer(f"bad {i}")]}
        for i, ask in enumerate({"role": "user", "content": text} for text in words * 5)
    ]
    (tmp_path / "pairs.jsonl").write_text(json_lines(rows))
    assert cli.main(["reward", "--preferences=pairs.jsonl", "--chat-template=t.jinja", "--epochs=1", "--out=run"]) == 0
    assert (tmp_path / "run" / "reward_model" / "chat_template.jinja").read_text() == template


@pytest.mark.parametrize("wrong", ["None", *map(slow, ["float('nan')", "'5'"])])
def test_a_reward_that_is_no_number_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: str
) -> None:
    """The third rollout fails at its second row; with the function mended, the run continues from there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("".join(f"word {i} is\n" for i in range(20)))
    good = "def score(prompts, completions):\n    return [float(len(c.text)) for c in completions]\n"
    bad = (
        "calls = []\ndef score(prompts, completions):\n    calls.append(1)\n    found = [1.0] * len(completions)\n"
        f"    if len(calls) > 4 and len(completions) == 4:\n        found[1] = {wrong}\n    return found\n"
    )
    (tmp_path / "mine.py").write_text(bad)
    command = [
        "train", "--prompts=prompts.txt", "--reward=mine.py:score", "--algorithm=rloo", "--sft.examples=0",
        "--test-prompts=2", "--samples=1", "--rloo.updates=8", "--rloo.rows=4", "--rloo.group=2", "--max-new-tokens=3",
        "--missing-eos-score=none", "--out=run", "--checkpoint-seconds=0",
    ]  # fmt: skip
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert "(row 1" in said.err
    assert "the score 'score'" in said.err
    (tmp_path / "mine.py").write_text(good)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert before
    assert cli.main(["train", "--resume", "run"]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)
