"""Labels by people, in one SQLite file: what is asked, what was shown, and every answer, of which none is changed."""

import hashlib
import hmac
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmgym.preferences.database import connect, named_errors
from lmgym.preferences.items import Item, Label, Purpose

HELD_OUT = 0.2
"""Share of the prompts whose labels are never trained on, chosen by a hash when they are added."""
FEW_PROMPTS = 10
"""With fewer different prompts, items are held out one by one, not by their prompt."""


class LabelStore:
    """A file of labels.

    Every public method is one transaction, which is on the disk when it returns. Several calls inside
    `transaction()` share one.

    Args:
        path: the SQLite file.
        create: make it if it does not exist.
        clock: gives the time in seconds since 1970.

    Raises:
        StoreError: the file cannot be used.
    """

    def __init__(
        self, path: str | os.PathLike[str], create: bool = False, clock: Callable[[], float] = time.time
    ) -> None:
        self.path, self.clock = Path(path), clock
        self.connection = connect(self.path, create)
        self._depth = 0
        self._secret = bytes.fromhex(self.meta("secret"))

    def __enter__(self) -> "LabelStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; what was committed is in it."""
        with named_errors(self.path):
            self.connection.close()

    @contextmanager
    def transaction(self, apart: bool = False) -> Iterator[sqlite3.Connection]:
        """All or nothing. When the outermost one ends, what it wrote is on the disk; inner ones are a part of it.

        Args:
            apart: an inner one that raises undoes itself alone, so that the outer one can go on.

        Raises:
            StoreError: nothing of it was written.
        """
        inner = self._depth > 0
        if inner and not apart:
            with named_errors(self.path):
                yield self.connection
            return
        name = f"s{self._depth}"
        begin, end, undo = ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
        if inner:
            begin, end, undo = f"SAVEPOINT {name}", f"RELEASE {name}", f"ROLLBACK TO {name}"
        with named_errors(self.path):
            self.connection.execute(begin)
            self._depth += 1
            try:
                yield self.connection
                self.connection.execute(end)
            except BaseException:
                if self.connection.in_transaction:  # where the disk is full, SQLite has already undone everything
                    self.connection.execute(undo)
                raise
            finally:
                self._depth -= 1

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        """The rows that a query finds."""
        with named_errors(self.path):
            return self.connection.execute(query, values).fetchall()

    def meta(self, key: str, default: str = "") -> str:
        """A value that belongs to the file as a whole."""
        found = self.rows("SELECT value FROM meta WHERE key = ?", key)
        return found[0]["value"] if found else default

    def set_meta(self, key: str, value: str) -> None:
        """Sets such a value."""
        with self.transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def digest(self, *parts: object) -> bytes:
        """A hash of the parts under the file's own key (HMAC-SHA256): nobody without the file can predict it."""
        return hmac.new(self._secret, json.dumps([str(part) for part in parts]).encode(), hashlib.sha256).digest()

    def draw(self, *parts: object) -> float:
        """A number in [0, 1) that the parts and the file's key determine."""
        return int.from_bytes(self.digest(*parts)[:6]) / 2**48

    # Items ------------------------------------------------------------------------------------------------------------

    def add_items(self, items: Sequence[Item], held_out: float | None = HELD_OUT) -> list[int]:
        """Adds questions as one batch, but those that are there: with the same prompt, purpose and texts in any order.

        Args:
            items: the questions.
            held_out: the share of the prompts to hold out; None keeps the split that the items have.

        Returns:
            The ids, of those that were there before too.
        """
        by_prompt = len({item.prompt for item in items}) >= FEW_PROMPTS
        ids = []
        with self.transaction() as connection:
            known = {
                (row["purpose"], row["prompt"], frozenset(json.loads(row["texts"]))): row["id"]
                for row in connection.execute("SELECT id, purpose, prompt, texts FROM items")
            }
            (batch,) = connection.execute("SELECT 1 + COALESCE(MAX(batch), 0) FROM items").fetchone()
            for item in items:
                key = (item.purpose, item.prompt, frozenset(item.texts))
                if key not in known:
                    split = item.split
                    if held_out is not None and item.purpose == "ask":
                        parts = (item.prompt,) if by_prompt else (item.prompt, *item.texts)
                        split = "test" if held_out_by_hash(parts, held_out) else "train"
                    row = (
                        item.purpose, item.prompt, _packed(item.messages), _packed(item.texts), item.best,
                        item.explanation, item.source, item.model, split, batch, self.clock(),
                    )  # fmt: skip
                    known[key] = connection.execute(_ADD_ITEM, row).lastrowid
                ids.append(known[key])
        return ids

    def items(self, purpose: Purpose | None = None) -> list[Item]:
        """All items in the order in which they were added, or those of one purpose."""
        where, values = ("WHERE purpose = ?", (purpose,)) if purpose else ("", ())
        return [item_of(row) for row in self.rows(f"SELECT * FROM items {where} ORDER BY id", *values)]

    def item(self, number: int) -> Item:
        """One item by its id."""
        return item_of(self.rows("SELECT * FROM items WHERE id = ?", number)[0])

    # Labellers and guidelines -----------------------------------------------------------------------------------------

    def labeller(self, name: str, role: str = "labeller") -> int:
        """The id of a labeller, who is added if the name is new.

        Raises:
            ValueError: the name is empty or very long.
        """
        if not 0 < len(name.strip()) <= 60:
            raise ValueError(f"a pseudonym has 1 to 60 characters, not {len(name)}")
        with self.transaction() as connection:
            connection.execute(
                "INSERT OR IGNORE INTO labellers (name, role, added_at) VALUES (?, ?, ?)", (name, role, self.clock())
            )
        return self.rows("SELECT id FROM labellers WHERE name = ?", name)[0]["id"]

    def token(self, labeller: int) -> str:
        """What a labeller's link holds: 32 hexadecimal digits that nobody without the file can guess."""
        return self.digest("token", labeller).hex()[:32]

    def set_guidelines(self, text: str) -> int:
        """The version of the guidelines; a new one if the text differs from the last."""
        last = self.guidelines()
        if text == last[1]:
            return last[0]
        with self.transaction() as connection:
            row = (last[0] + 1, text, self.clock())
            connection.execute("INSERT INTO guidelines VALUES (?, ?, ?)", row)
        return last[0] + 1

    def guidelines(self) -> tuple[int, str]:
        """The newest version and its text; 0 and "" before the first version."""
        found = self.rows("SELECT version, text FROM guidelines ORDER BY version DESC LIMIT 1")
        return (found[0]["version"], found[0]["text"]) if found else (0, "")

    # Answers ----------------------------------------------------------------------------------------------------------

    def labels(self) -> list[Label]:
        """The labels that count, in the order in which they were given."""
        names = {row["id"]: row["name"] for row in self.rows("SELECT id, name FROM labellers")}
        return [label_of(row, names[row["labeller"]]) for row in self.rows("SELECT * FROM labels ORDER BY id")]

    def record(self, row: dict[str, Any]) -> int:
        """Appends an event, and counts the labels of its item anew; returns its id."""
        with self.transaction() as connection:
            names = ", ".join(row)
            places = ", ".join("?" * len(row))
            event = connection.execute(f"INSERT INTO events ({names}) VALUES ({places})", list(row.values())).lastrowid
            connection.execute(_COUNT + " WHERE id = ?", (row["item"],))
        return int(event or 0)

    def withdraw(self, name: str) -> int:
        """Deletes all answers of a labeller, and the name; what remains is that somebody withdrew, and when.

        The rows are overwritten in the file. Copies that were exported before are not changed.

        Returns:
            The number of events that were deleted.

        Raises:
            ValueError: there is no such labeller.
        """
        found = self.rows("SELECT id FROM labellers WHERE name = ? AND withdrawn_at IS NULL", name)
        if not found:
            names = [row["name"] for row in self.rows("SELECT name FROM labellers WHERE withdrawn_at IS NULL")]
            raise ValueError(f"{self.path}: no labeller {name!r}; there are {', '.join(names) or 'none yet'}")
        number, now = found[0]["id"], self.clock()
        with self.transaction() as connection:
            items = [row["item"] for row in self.rows("SELECT DISTINCT item FROM events WHERE labeller = ?", number)]
            (events,) = connection.execute("SELECT COUNT(*) FROM events WHERE labeller = ?", (number,)).fetchone()
            connection.execute("INSERT INTO withdrawals VALUES (?, ?, ?)", (number, now, events))
            connection.execute("DELETE FROM events WHERE labeller = ?", (number,))
            connection.execute("DELETE FROM showings WHERE labeller = ?", (number,))
            connection.execute(
                "UPDATE labellers SET name = ?, withdrawn_at = ? WHERE id = ?", (f"withdrawn-{number}", now, number)
            )
            connection.executemany(_COUNT + " WHERE id = ?", [(item,) for item in items])
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")  # the journal still held the rows
        return events

    # Reward models ----------------------------------------------------------------------------------------------------

    def set_scores(self, scores: dict[int, Sequence[Sequence[float]]]) -> None:
        """Replaces the scores of texts: for each item's id, one row per member of the ensemble, one number per text."""
        rows = [
            (item, member, json.dumps(list(row)))
            for item, members in scores.items()
            for member, row in enumerate(members)
        ]
        with self.transaction() as connection:
            connection.execute("DELETE FROM scores")
            connection.executemany("INSERT INTO scores VALUES (?, ?, ?)", rows)

    def add_training(self, labels: int, model: str, right: int, pairs: int) -> None:
        """Notes that a reward model was trained on so many labels, and was right on so many held-out pairs."""
        with self.transaction() as connection:
            row = (self.clock(), labels, model, right, pairs)
            connection.execute("INSERT INTO trainings (at, labels, model, right, pairs) VALUES (?, ?, ?, ?, ?)", row)


_ADD_ITEM = (
    "INSERT INTO items (purpose, prompt, messages, texts, best, explanation, source, model, split, batch, added_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_COUNT = (
    "UPDATE items SET labels = (SELECT COUNT(*) FROM labels AS l WHERE l.item = items.id AND l.repeat = 0 AND "
    "l.answer != 'skip')"
)


def held_out_by_hash(parts: Sequence[str], share: float) -> bool:
    """Whether a text is held out: by its hash alone, so in every file and on every machine alike."""
    whole = hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).digest()
    return int.from_bytes(whole[:6]) < share * 2**48


def item_of(row: sqlite3.Row) -> Item:
    """The item in a row of the table."""
    return Item(
        prompt=row["prompt"],
        texts=tuple(json.loads(row["texts"])),
        messages=tuple(json.loads(row["messages"])),
        purpose=row["purpose"],
        best=row["best"],
        explanation=row["explanation"],
        source=row["source"],
        model=row["model"],
        split=row["split"],
        id=row["id"],
    )


def label_of(row: sqlite3.Row, labeller: str) -> Label:
    """The label in a row of the view."""
    detail = json.loads(row["detail"])
    return Label(
        id=row["id"],
        item=row["item"],
        labeller=labeller,
        answer=row["answer"],
        ranking=tuple(detail.get("ranking", ())),
        text=detail.get("text", ""),
        strength=row["strength"],
        side=tuple(json.loads(row["side"])),
        repeat=bool(row["repeat"]),
        shown_at=row["shown_at"],
        answered_at=row["answered_at"],
        client_ms=row["client_ms"],
        guideline=row["guideline"],
        model=row["model"],
    )


def _packed(value: Sequence[Any]) -> str:
    return json.dumps(list(value), ensure_ascii=False)
