"""Labels as files: for training, for other tools, and whole, so that they can be read back exactly."""

import json
import os
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from lmgym.io import Source, atomic, read_jsonl, read_rows, source_name
from lmgym.io.jsonl import parse_json
from lmgym.preferences.comparisons import Comparison, comparison_row
from lmgym.preferences.items import Item, Label, answer_of
from lmgym.preferences.rows import comparison_of, read_comparisons
from lmgym.preferences.store import LabelStore
from lmgym.tasks.prompt_rows import prompt_of

Format = Literal["pairs", "conversations", "argilla", "texts", "whole"]
Ties = Literal["drop", "half"]
NAMESPACE = uuid.UUID("6f0c1d0e-5c3b-4d5a-9b57-7a4c1f0d2e11")
"""Of the user ids in Argilla's format, which follow from the pseudonyms."""


def comparisons_of(
    store: LabelStore, split: Literal["train", "test"] | None = None, ties: Ties = "drop"
) -> list[Comparison]:
    """The labels that can train a reward model, one comparison per label, in the order in which they were given.

    Answers "neither" and "skip", repeats, and answers to items with a known answer are left out.

    Args:
        store: the file of labels.
        split: those to train on, or those that are held out; None: both.
        ties: leave ties out, or keep them as comparisons whose target is ½.
    """
    items = {item.id: item for item in store.items("ask")}
    found = []
    for label in store.labels():
        item = items.get(label.item)
        if item is None or label.repeat or split not in (None, item.split):
            continue
        if label.ranking or (label.answer == "tie" and ties == "half"):
            # The order of a tie means nothing: the alphabet's is the same in every copy.
            texts = tuple(item.texts[index] for index in label.ranking) or tuple(sorted(item.texts))
            found.append(Comparison(item.prompt, texts, item.messages, is_tie=not label.ranking))
    return found


def export_labels(
    store: LabelStore,
    path: str | os.PathLike[str],
    form: Format = "pairs",
    ties: Ties = "drop",
    split: Literal["all", "train", "test"] = "all",
) -> int:
    """Writes labels to a file, which `import_labels` reads back; returns the number of rows.

    Args:
        store: the file of labels.
        path: the file to write.
        form: "pairs": prompt, chosen and rejected as texts, or prompt and ranking. "conversations": the same as
            messages, as TRL reads them. "argilla": the records that `Dataset.records.to_json` of Argilla 2 writes.
            "texts": prompts and the texts that people wrote, for fine-tuning. "whole": all items, labellers and events.
        ties: as in `comparisons_of`, for "pairs" and "conversations".
        split: for the same, which labels.
    """
    if form == "whole":
        rows = list(_whole_rows(store))
    elif form == "argilla":
        rows = _argilla_records(store)
    elif form == "texts":
        rows = _written_rows(store)
    elif form in get_args(Format):
        make = comparison_row if form == "pairs" else _conversation_row
        rows = [make(comparison) for comparison in comparisons_of(store, None if split == "all" else split, ties)]
    else:
        raise ValueError(f"no format {form!r}: give one of {', '.join(get_args(Format))}")
    if form == "argilla":
        text = json.dumps(rows, ensure_ascii=False, indent=1) + "\n"
    else:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomic.write(path, text)
    return len(rows)


def import_labels(store: LabelStore, path: str | os.PathLike[str], form: Format, labeller: str = "imported") -> int:
    """Reads a file of `export_labels`; returns the number of rows. What the store has already is not added again.

    Args:
        store: receives the items and labels.
        path: the file.
        form: as in `export_labels`.
        labeller: the pseudonym for labels of a file that names none.

    Raises:
        ValueError: a row is malformed; the message names the file and the row. Nothing is added.
    """
    readers = {
        "pairs": partial(_read_comparisons, labeller=labeller),
        "conversations": partial(_read_comparisons, labeller=labeller),
        "argilla": partial(_read_argilla, labeller=labeller),
        "texts": partial(_read_texts, labeller=labeller),
        "whole": _read_whole,
    }
    with store.transaction():
        return readers[form](store, Path(path))


# Questions ------------------------------------------------------------------------------------------------------------


def read_items(
    source: Source,
    fields: Mapping[str, str] | None = None,
    purpose: Literal["ask", "gold"] = "ask",
    say: Callable[[str], object] | None = None,
) -> list[Item]:
    """Reads texts to compare: comparisons in any common form, or rows with a prompt and a list of texts without a rank.

    Args:
        source: a file, a folder, the name of a data set, or rows; see `lmgym.io.read_rows`.
        fields: other names for fields.
        purpose: "gold" for rows whose best text is known, with an optional "explanation".
        say: receives messages for the user, such as the number of rows that compare a text with itself.

    Raises:
        ValueError: a row is malformed, or cannot be shown; the message names the file and the row.
    """
    notes: Counter[str] = Counter()
    items, name = [], source_name(source)
    for place, row in read_rows(source, fields):
        try:
            items.append(_item(row, place, purpose, notes, name))
        except ValueError as error:
            said = str(error)
            raise ValueError(said if said.startswith(place) else f"{place}: {said}") from error
    for what, count in notes.items():
        (say or warnings.warn)(f"{name}: {count} of {len(items)} rows {what}")
    found = [item for item in items if item is not None]
    if not found:
        raise ValueError(f"{name}: no row has two different texts to compare")
    return found


UNRANKED = ("texts", "completions", "responses", "answers", "generations")


def _item(
    row: Mapping[str, Any], place: str, purpose: Literal["ask", "gold"], notes: Counter[str], source: str
) -> Item | None:
    texts = next((row[name] for name in UNRANKED if isinstance(row.get(name), list)), None)
    if purpose == "ask" and texts is not None and all(isinstance(text, str) for text in texts):
        prompt = prompt_of(row, place)
        return Item(prompt.text, tuple(texts), prompt.messages, source=source)
    comparison = comparison_of(row, place, notes)
    if comparison is None:
        return None
    explanation = row.get("explanation")
    item = Item.of(comparison, purpose, source)
    return replace(item, explanation=explanation) if isinstance(explanation, str) else item


# Comparisons ----------------------------------------------------------------------------------------------------------


def _conversation_row(comparison: Comparison) -> dict[str, Any]:
    messages = list(comparison.messages) or [{"role": "user", "content": comparison.prompt}]
    row = comparison_row(comparison) | {"prompt": messages}
    row.pop("messages", None)
    for name in ("chosen", "rejected"):
        if name in row:
            row[name] = [{"role": "assistant", "content": row[name]}]
    return row


def _read_comparisons(store: LabelStore, path: Path, labeller: str) -> int:
    found = read_comparisons(path, as_written=True, ties="half")
    ids = store.add_items([Item.of(comparison, source=path.name) for comparison in found])
    seen: Counter[int] = Counter()
    for number, comparison in zip(ids, found, strict=True):
        item = store.item(number)
        order = () if comparison.is_tie else tuple(item.texts.index(text) for text in comparison.ranked)
        seen[number] += 1  # a second label of the same texts is by somebody else
        name = labeller if seen[number] == 1 else f"{labeller}-{seen[number]}"
        _add(store, number, name, order, "tie" if comparison.is_tie else "")
    return len(found)


def _add(store: LabelStore, item: int, name: str, order: Sequence[int], answer: str = "", text: str = "") -> None:
    """Adds a label that was given elsewhere, once: its sides and times are unknown."""
    texts = len(store.item(item).texts)
    if not answer:
        answer, _ = answer_of("ranking", range(texts), order) if texts > 2 else ("ab"[order[0]], ())
    detail = ({"ranking": list(order)} if order else {}) | ({"text": text} if text else {})
    packed = json.dumps(detail, ensure_ascii=False)
    nonce = store.digest("import", item, name, answer, packed).hex()[:32]
    if store.rows("SELECT 1 FROM events WHERE nonce = ?", nonce):
        return
    store.record(
        {
            "item": item,
            "labeller": store.labeller(name),
            "answer": answer,
            "detail": packed,
            "side": "[]",
            "repeat": 0,
            "nonce": nonce,
            "answered_at": store.clock(),
            "guideline": 0,
            "model": "",
        }
    )


# Texts that people wrote ----------------------------------------------------------------------------------------------


def _written_rows(store: LabelStore) -> list[dict[str, Any]]:
    items = {item.id: item for item in store.items("write")}
    labels = [label for label in store.labels() if label.answer == "text"]
    return [
        _prompt_row(items[label.item]) | {"demonstration": label.text, "labeller": label.labeller} for label in labels
    ]


def _prompt_row(item: Item) -> dict[str, Any]:
    return {"messages": list(item.messages)} if item.messages else {"prompt": item.prompt}


def _read_texts(store: LabelStore, path: Path, labeller: str) -> int:
    rows = read_jsonl(path, ("demonstration",))
    for number, row in enumerate(rows, start=1):
        try:
            item = Item(row.get("prompt", ""), messages=row.get("messages", ()), purpose="write", source=path.name)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        (added,) = store.add_items([item])
        _add(store, added, row.get("labeller", labeller), (), "text", row["demonstration"])
    return len(rows)


# Argilla --------------------------------------------------------------------------------------------------------------


def _argilla_records(store: LabelStore) -> list[dict[str, Any]]:
    """One record per item; the question is named "preference". Repeats are left out."""
    labels: dict[int, list[Label]] = {}
    for label in store.labels():
        if not label.repeat:
            labels.setdefault(label.item, []).append(label)
    records = []
    for item in store.items("ask"):
        own = labels.get(item.id, [])
        responses = [{"value": _argilla_value(label), "user_id": _user_id(label.labeller)} for label in own]
        fields: dict[str, Any] = {"prompt": list(item.messages) if item.messages else item.prompt}
        records.append(
            {
                "id": f"lmgym-{item.id}",
                "fields": fields | {f"response-{index}": text for index, text in enumerate(item.texts)},
                "metadata": {"split": item.split, "labellers": [label.labeller for label in own]},
                "suggestions": {},
                "responses": {"preference": responses} if responses else {},
                "vectors": {},
            }
        )
    return records


def _argilla_value(label: Label) -> str | list[str]:
    if label.answer == "ranking":
        return [f"response-{index}" for index in label.ranking]
    return f"response-{label.ranking[0]}" if label.ranking else label.answer


def _user_id(name: str) -> str:
    return str(uuid.uuid5(NAMESPACE, name))


def _read_argilla(store: LabelStore, path: Path, labeller: str) -> int:
    try:
        records = parse_json(path.read_text(encoding="utf-8"), strict=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON in UTF-8 ({error})") from error
    if not isinstance(records, list):
        raise ValueError(f"{path}: give a list of Argilla's records, as Dataset.records.to_json writes them")
    for number, record in enumerate(records, start=1):
        try:
            _read_record(store, record, path.name, labeller)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}, record {number}: {type(error).__name__}: {error}") from error
    return len(records)


def _read_record(store: LabelStore, record: Mapping[str, Any], source: str, labeller: str) -> None:
    fields, metadata = record["fields"], record.get("metadata") or {}
    prompt, names = fields["prompt"], [name for name in fields if name != "prompt"]
    messages = prompt if isinstance(prompt, list) else ()
    item = Item(
        "" if isinstance(prompt, list) else prompt,
        tuple(fields[name] for name in names),
        messages,
        source=source,
        split=metadata.get("split", "train"),
    )
    (added,) = store.add_items([item], None if "split" in metadata else 0.2)
    texts = store.item(added).texts
    given = [response for responses in (record.get("responses") or {}).values() for response in responses]
    pseudonyms = metadata.get("labellers") or [response.get("user_id") or labeller for response in given]
    for response, name in zip(given, pseudonyms, strict=True):
        value = response["value"]
        chosen = value if isinstance(value, list) else [value]
        if all(entry in fields and entry != "prompt" for entry in chosen):
            order = [texts.index(fields[entry]) for entry in chosen]
            order += [index for index in range(len(texts)) if index not in order]
            _add(store, added, str(name), order)
        elif value in ("tie", "neither", "skip"):
            _add(store, added, str(name), (), value)
        else:
            raise ValueError(f"the answer {value!r}: known are {', '.join(names)}, tie, neither and skip")


# Everything -----------------------------------------------------------------------------------------------------------


ITEM_FIELDS = (
    "purpose", "best", "explanation", "source", "model", "split", "batch", "added_at", "asked_at", "strategy",
    "propensity",
)  # fmt: skip
EVENT_FIELDS = (
    "answer", "strength", "nonce", "shown_at", "answered_at", "client_ms", "guideline", "model",
)  # fmt: skip


def _whole_rows(store: LabelStore) -> list[dict[str, Any]]:
    """Guidelines, labellers, items and events; they refer to one another by their place among their kind."""
    rows: list[dict[str, Any]] = []
    for row in store.rows("SELECT * FROM guidelines ORDER BY version"):
        rows.append({"kind": "guidelines", **{name: row[name] for name in ("version", "text", "added_at")}})
    names = {}
    for row in store.rows("SELECT * FROM labellers WHERE withdrawn_at IS NULL ORDER BY id"):
        names[row["id"]] = row["name"]
        rows.append({"kind": "labeller", **{name: row[name] for name in ("name", "role", "added_at")}})
    items, events = {}, {}
    for place, row in enumerate(store.rows("SELECT * FROM items ORDER BY id")):
        items[row["id"]] = place
        texts = {name: json.loads(row[name]) for name in ("messages", "texts")}
        rows.append({"kind": "item", "prompt": row["prompt"], **texts, **{name: row[name] for name in ITEM_FIELDS}})
    for place, row in enumerate(store.rows("SELECT * FROM events ORDER BY id")):
        events[row["id"]] = place
        found = {"kind": "event", "item": items[row["item"]], "labeller": names[row["labeller"]]}
        found |= {name: row[name] for name in EVENT_FIELDS}
        found |= {"detail": json.loads(row["detail"]), "side": json.loads(row["side"]), "repeat": bool(row["repeat"])}
        rows.append(found | {"undo_of": None if row["undo_of"] is None else events[row["undo_of"]]})
    return rows


def _read_whole(store: LabelStore, path: Path) -> int:
    rows = read_jsonl(path, ("kind",))
    items: list[int] = []
    events: list[int] = []
    readers = {
        "guidelines": lambda row: _insert(store, "guidelines", row),
        "labeller": lambda row: _insert(store, "labellers", row),
        "item": lambda row: items.append(_read_item(store, row)),
        "event": lambda row: events.append(_read_event(store, row, items, events)),
    }
    for number, row in enumerate(rows, start=1):
        try:
            readers[row.pop("kind")](row)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"{path}, row {number}: {type(error).__name__}: {error}") from error
    return len(rows)


def _insert(store: LabelStore, table: str, row: Mapping[str, Any]) -> None:
    names = ", ".join(row)
    with store.transaction() as connection:
        connection.execute(
            f"INSERT OR IGNORE INTO {table} ({names}) VALUES ({', '.join('?' * len(row))})", list(row.values())
        )


def _read_item(store: LabelStore, row: Mapping[str, Any]) -> int:
    own = ("prompt", "texts", "messages", "purpose", "best", "explanation", "source", "model", "split")
    values: dict[str, Any] = {name: row[name] for name in own} | {"texts": tuple(row["texts"])}
    (added,) = store.add_items([Item(**values)], None)
    rest = ("batch", "added_at", "asked_at", "strategy", "propensity")
    with store.transaction() as connection:
        sets = ", ".join(f"{name} = ?" for name in rest)
        connection.execute(f"UPDATE items SET {sets} WHERE id = ?", (*(row[name] for name in rest), added))
    return added


def _read_event(store: LabelStore, row: Mapping[str, Any], items: Sequence[int], events: Sequence[int]) -> int:
    undo_of = None if row["undo_of"] is None else events[row["undo_of"]]
    labeller = store.labeller(row["labeller"])
    before = store.rows(
        "SELECT id FROM events WHERE (nonce IS NOT NULL AND nonce = ?) OR (undo_of IS NOT NULL AND undo_of = ?)",
        row["nonce"],
        undo_of,
    )
    if before:
        return before[0]["id"]
    packed = {
        "detail": json.dumps(row["detail"], ensure_ascii=False),
        "side": json.dumps(row["side"]),
        "repeat": int(row["repeat"]),
    }
    own = {name: row[name] for name in EVENT_FIELDS}
    return store.record(own | packed | {"item": items[row["item"]], "labeller": labeller, "undo_of": undo_of})
