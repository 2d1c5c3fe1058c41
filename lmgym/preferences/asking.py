"""Whom to ask what: leases, overlap, repeats, hidden gold items, and what becomes of an answer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmgym.preferences.items import Item, Showing, answer_of
from lmgym.preferences.queries import RANDOM_SHARE, Strategy, choose
from lmgym.preferences.store import LabelStore

FUTURE = 5.0
"""Seconds by which a lease may have begun in the future before it counts as one from before the clock was set back."""
REPEAT_AFTER = 10
"""An item is repeated at the earliest after so many other answers."""


@dataclass(frozen=True)
class Rules:
    """How questions are handed out.

    Attributes:
        overlap: so many labellers answer each item.
        repeat_share: share of the questions that a labeller gets a second time, with the sides reversed.
        gold_share: share of hidden questions with a known answer.
        calibration: questions with feedback that every labeller answers first, as far as there are any.
        lease_seconds: an item that is shown is reserved for so long.
        strategy: how the others are chosen; see `queries.choose`.
        random_share: share of the questions that is random in any case.
        strength: whether the page asks by how much a text is better.
        most: the most items to ask, of those with the purpose "ask"; None: all.
    """

    overlap: int = 1
    repeat_share: float = 0.05
    gold_share: float = 0.05
    calibration: int = 10
    lease_seconds: float = 120.0
    strategy: Strategy = "random"
    random_share: float = RANDOM_SHARE
    strength: bool = False
    most: int | None = None

    def __post_init__(self) -> None:
        shares = (self.repeat_share, self.gold_share)
        if self.overlap < 1 or self.calibration < 0 or not self.lease_seconds > 0:
            raise ValueError(
                f"overlap={self.overlap} must be 1 or more, calibration={self.calibration} 0 or more, and "
                f"lease_seconds={self.lease_seconds} positive"
            )
        if min(shares) < 0 or sum(shares) > 0.5:
            raise ValueError(f"repeat_share and gold_share are {shares}: give 0 or more, and at most 0.5 in all")
        if not RANDOM_SHARE <= self.random_share <= 1:
            raise ValueError(f"random_share={self.random_share} is out of range: give {RANDOM_SHARE} to 1")


@dataclass(frozen=True)
class Outcome:
    """What became of an answer.

    Attributes:
        event: the number of the event that counts.
        answer: what it holds, as in `Label`; of a second answer with the same nonce, that of the first.
        is_new: whether this call recorded it.
        right: in the calibration round, whether it is the known answer; None elsewhere.
        item: what was answered.
    """

    event: int
    answer: str
    is_new: bool
    right: bool | None
    item: Item


class Asker:
    """Hands out questions of a store and takes the answers.

    Args:
        store: the file of labels.
        rules: how.
    """

    def __init__(self, store: LabelStore, rules: Rules | None = None) -> None:
        self.store, self.rules = store, rules or Rules()
        # (items, items asked), and of those that nobody was asked: ids, whether they are held out, batches.
        self._left: tuple[Any, ...] | None = None

    # Questions --------------------------------------------------------------------------------------------------------

    def next(self, labeller: int) -> Showing | None:
        """What a labeller is asked now; None if nothing is left.

        Until it is answered, it is the same question with the same nonce, in every tab.
        """
        with self.store.transaction():
            return self._open_showing(labeller) or self._new_showing(labeller)

    def _open_showing(self, labeller: int) -> Showing | None:
        """The question that this labeller was shown and has not answered, reserved anew if nobody else took it."""
        found = self.store.rows("SELECT * FROM showings WHERE answered = 0 AND labeller = ?", labeller)
        if not found:
            return None
        row = found[0]
        if self._has_expired(row) and self._is_taken(row["item"], labeller):
            with self.store.transaction() as connection:
                connection.execute("UPDATE showings SET answered = 2 WHERE nonce = ?", (row["nonce"],))
            return None
        now = self.store.clock()
        with self.store.transaction() as connection:
            times = (now if self._has_expired(row) else row["shown_at"], now + self.rules.lease_seconds, row["nonce"])
            connection.execute("UPDATE showings SET shown_at = ?, expires_at = ? WHERE nonce = ?", times)
        side = tuple(json.loads(row["side"]))
        return Showing(row["nonce"], self.store.item(row["item"]), side, bool(row["repeat"]))

    def _has_expired(self, row: Any) -> bool:
        now = self.store.clock()
        return now >= row["expires_at"] or row["shown_at"] > now + FUTURE

    def _is_taken(self, item: int, labeller: int) -> bool:
        """Whether as many others answer an item, or are about to, as shall."""
        row = self.store.rows(
            f"SELECT purpose, labels, {_RESERVED} AS reserved FROM items WHERE id = ?", *self._now(labeller), item
        )[0]
        return row["purpose"] in ("ask", "write") and row["labels"] + row["reserved"] >= self._overlap(row["purpose"])

    def _overlap(self, purpose: str) -> int:
        return 1 if purpose == "write" else self.rules.overlap

    def _now(self, labeller: int) -> tuple[int, float, float]:
        """The values of `_RESERVED`: leases of others that hold now."""
        now = self.store.clock()
        return labeller, now, now + FUTURE

    def _new_showing(self, labeller: int) -> Showing | None:
        answered = self.store.rows(_ANSWERED, labeller)
        done = {row["item"] for row in answered}
        number = self._calibration(done)
        if number is not None:
            return self._show(number, labeller)
        asked = sum(row["purpose"] in ("ask", "gold") for row in answered)
        drawn = self.store.draw("kind", labeller, asked)
        if drawn < self.rules.repeat_share:
            number = self._to_repeat(labeller)
            if number is not None:
                return self._show(number, labeller, repeat=True)
        elif drawn < self.rules.repeat_share + self.rules.gold_share:
            gold = [row["id"] for row in self.store.rows("SELECT id FROM items WHERE purpose = 'gold'")]
            left = [item for item in gold if item not in done]
            if left:
                return self._show(left[int(self.store.draw("gold", labeller, asked) * len(left))], labeller)
        number = self._begun(labeller)
        if number is None:
            number = self._chosen()
        return None if number is None else self._show(number, labeller)

    def _calibration(self, done: set[int]) -> int | None:
        rows = self.store.rows(
            "SELECT id FROM items WHERE purpose = 'calibration' ORDER BY id LIMIT ?", self.rules.calibration
        )
        return next((row["id"] for row in rows if row["id"] not in done), None)

    def _to_repeat(self, labeller: int) -> int | None:
        """An item of an earlier answer, which may be neither a skip nor the latest ones."""
        rows = self.store.rows(_REPEATABLE, labeller, labeller, REPEAT_AFTER)
        return rows[0]["item"] if rows else None

    def _begun(self, labeller: int) -> int | None:
        """The first item that others have been asked already and that needs more answers."""
        rows = self.store.rows(_BEGUN, self.rules.overlap, labeller, *self._now(labeller), self.rules.overlap)
        return rows[0]["id"] if rows else None

    def _chosen(self) -> int | None:
        """An item that nobody was asked yet, by the strategy; the choice is stored with its propensity."""
        store, rules = self.store, self.rules
        (total,), (left,) = store.rows(_ALL)[0], store.rows(_LEFT)[0]
        asked = total - left
        if not left or (rules.most is not None and asked >= rules.most):
            return None
        if self._left is None or self._left[0] != (total, asked):
            rows = sorted(store.rows(_NEVER_ASKED), key=lambda row: row["id"])
            columns = (
                [row["id"] for row in rows],
                [row["split"] == "test" for row in rows],
                [row["batch"] for row in rows],
            )
            self._left = ((total, asked), *map(np.array, columns))
        _, ids, is_test, batches = self._left
        rng = np.random.default_rng(int.from_bytes(store.digest("query", asked)))
        scores = None
        if rules.strategy in ("disagreement", "margin"):
            scores = self.scores(ids.tolist())
            if scores is not None and len(scores) < 2 and rules.strategy == "disagreement":
                scores = None  # one model cannot disagree
        query = choose(rules.strategy, is_test, batches, scores, rng, rules.random_share)
        number = int(ids[query.index])
        # What is left after this choice. If it is rolled back, the same one is made again: the key decides it.
        rest = (np.delete(column, query.index) for column in (ids, is_test, batches))
        self._left = ((total, asked + 1), *rest)
        with store.transaction() as connection:
            values = (store.clock(), query.strategy, query.propensity, number)
            connection.execute("UPDATE items SET asked_at = ?, strategy = ?, propensity = ? WHERE id = ?", values)
        return number

    def scores(self, items: Sequence[int]) -> np.ndarray | None:
        """[K, N, T] the stored scores of items, NaN where an item has no score; None if no item has one."""
        found = {
            (row["item"], row["member"]): json.loads(row["scores"]) for row in self.store.rows("SELECT * FROM scores")
        }
        if not found:
            return None
        members, texts = 1 + max(member for _, member in found), max(map(len, found.values()))
        scores = np.full((members, len(items), texts), np.nan)
        for place, item in enumerate(items):
            for member in range(members):
                row = found.get((item, member), [])
                scores[member, place, : len(row)] = row
        return scores

    def _show(self, number: int, labeller: int, repeat: bool = False) -> Showing:
        """Reserves an item for a labeller. The order of the texts follows from the file's key, and is stored."""
        store, now, item = self.store, self.store.clock(), self.store.item(number)
        draws = [store.draw("side", number, labeller, text) for text in range(len(item.texts))]
        side = tuple(sorted(range(len(draws)), key=draws.__getitem__, reverse=repeat))
        count = store.rows("SELECT COUNT(*) AS n FROM showings WHERE item = ? AND labeller = ?", number, labeller)[0][
            "n"
        ]
        nonce = store.digest("nonce", number, labeller, repeat, count).hex()[:32]
        row = (
            nonce,
            number,
            labeller,
            repeat,
            json.dumps(side),
            store.guidelines()[0],
            now,
            now + self.rules.lease_seconds,
        )
        with store.transaction() as connection:
            connection.execute(_ADD_SHOWING, row)
        return Showing(nonce, item, side, repeat)

    # Answers ----------------------------------------------------------------------------------------------------------

    def answer(
        self,
        labeller: int,
        nonce: str,
        choice: str,
        ranking: Sequence[int] = (),
        text: str = "",
        strength: int | None = None,
        client_ms: float | None = None,
    ) -> Outcome:
        """Records an answer. When it returns outside a transaction, the answer is on the disk.

        An answer that comes after its lease has expired counts too. A second one with the same nonce does not.

        Args:
            labeller: who answers.
            nonce: of the showing.
            choice: a `Choice`.
            ranking: positions on the page, best first, for the choice "ranking".
            text: what was written, for the choice "text".
            strength: 1 to 4.
            client_ms: how long the page was shown, by the browser's clock.

        Raises:
            ValueError: there is no such showing for this labeller, or the choice does not fit the item.
        """
        store = self.store
        with store.transaction() as connection:
            found = store.rows("SELECT * FROM showings WHERE nonce = ? AND labeller = ?", nonce, labeller)
            if not found:
                raise ValueError("this question was not shown to you: reload the page")
            row = found[0]
            item, side = store.item(row["item"]), tuple(json.loads(row["side"]))
            before = store.rows("SELECT id, answer FROM events WHERE nonce = ?", nonce)
            if before:
                return self._outcome(before[0]["id"], before[0]["answer"], False, item)
            answer, order = answer_of(choice, side, ranking)
            if (choice == "text" and not text.strip()) or strength not in (None, 1, 2, 3, 4):
                raise ValueError(f"an empty text, or the strength {strength!r}: give a text, and a strength of 1 to 4")
            detail: dict[str, Any] = ({"ranking": order} if order else {}) | ({"text": text} if text else {})
            event = store.record(
                {
                    "item": item.id,
                    "labeller": labeller,
                    "answer": answer,
                    "detail": json.dumps(detail, ensure_ascii=False),
                    "strength": strength,
                    "side": row["side"],
                    "repeat": row["repeat"],
                    "nonce": nonce,
                    "shown_at": row["shown_at"],
                    "answered_at": store.clock(),
                    "client_ms": client_ms,
                    "guideline": row["guideline"],
                    "model": item.model,
                }
            )
            connection.execute("UPDATE showings SET answered = 1 WHERE nonce = ?", (nonce,))
        return self._outcome(event, answer, True, item, order)

    def _outcome(self, event: int, answer: str, is_new: bool, item: Item, order: Sequence[int] = ()) -> Outcome:
        is_told = item.purpose == "calibration" and bool(order)
        return Outcome(event, answer, is_new, order[0] == item.best if is_told else None, item)

    def undo(self, labeller: int, event: int) -> bool:
        """Takes an answer back, by an event of its own; the item is shown again at once.

        Returns:
            Whether this call did it; False if it had been taken back before.

        Raises:
            ValueError: it is not an answer of this labeller.
        """
        store = self.store
        with store.transaction() as connection:
            found = store.rows(
                "SELECT * FROM events WHERE id = ? AND labeller = ? AND answer != 'undo'", event, labeller
            )
            if not found:
                raise ValueError("there is no such answer of yours to take back: reload the page")
            if store.rows("SELECT 1 FROM events WHERE undo_of = ?", event):
                return False
            row = found[0]
            kept = ("item", "labeller", "side", "repeat", "guideline", "model")
            undone = {name: row[name] for name in kept}
            store.record(undone | {"answer": "undo", "detail": "{}", "answered_at": store.clock(), "undo_of": event})
            connection.execute("DELETE FROM showings WHERE answered = 0 AND labeller = ?", (labeller,))
            self._show(row["item"], labeller, bool(row["repeat"]))
        return True

    def latest(self, labeller: int) -> int | None:
        """The labeller's latest answer that counts, which can be undone."""
        found = self.store.rows("SELECT MAX(id) AS id FROM labels WHERE labeller = ?", labeller)
        return found[0]["id"]

    def progress(self, labeller: int) -> dict[str, int]:
        """How far it is: answers of this labeller ("mine"), labels of all ("all"), and how many are wanted ("wanted").

        "mine" counts every answer, "all" one per item and labeller that counts towards the overlap.
        """
        mine = self.store.rows("SELECT COUNT(*) AS n FROM labels WHERE labeller = ?", labeller)[0]["n"]
        row = self.store.rows(_PROGRESS, self.rules.overlap, self.rules.overlap)[0]
        most = row["items"] if self.rules.most is None else min(row["items"], self.rules.most * self.rules.overlap)
        return {"mine": mine, "all": row["done"], "wanted": most}


_RESERVED = (
    "(SELECT COUNT(*) FROM showings AS s WHERE s.item = items.id AND s.answered = 0 AND s.labeller != ? AND "
    "s.expires_at > ? AND s.shown_at <= ?)"
)
_ANSWERED = "SELECT l.item, i.purpose FROM labels AS l JOIN items AS i ON i.id = l.item WHERE l.labeller = ?"
_REPEATABLE = (
    "SELECT item FROM (SELECT l.id, l.item FROM labels AS l JOIN items AS i ON i.id = l.item WHERE l.labeller = ? AND "
    "l.answer != 'skip' AND i.purpose = 'ask' AND NOT EXISTS (SELECT 1 FROM labels AS r WHERE r.item = l.item AND "
    "r.labeller = ? AND r.repeat = 1) ORDER BY l.id DESC LIMIT -1 OFFSET ?) ORDER BY id LIMIT 1"
)
_BEGUN = (
    "SELECT id FROM items INDEXED BY begun WHERE asked_at IS NOT NULL AND labels < ? AND purpose IN ('ask', 'write') "
    f"AND NOT EXISTS (SELECT 1 FROM labels AS l WHERE l.item = items.id AND l.labeller = ?) AND labels + {_RESERVED} < "
    "CASE purpose WHEN 'write' THEN 1 ELSE ? END ORDER BY asked_at, id LIMIT 1"
)
_PROGRESS = (
    "SELECT COALESCE(SUM(CASE purpose WHEN 'write' THEN 1 ELSE ? END), 0) AS items, COALESCE(SUM(MIN(labels, ?)), 0) "
    "AS done FROM items WHERE purpose IN ('ask', 'write')"
)
_ALL = "SELECT COUNT(*) FROM items WHERE purpose IN ('ask', 'write')"
_LEFT = "SELECT COUNT(*) FROM items INDEXED BY never_asked WHERE purpose IN ('ask', 'write') AND asked_at IS NULL"
_NEVER_ASKED = (
    "SELECT id, split, batch FROM items INDEXED BY never_asked WHERE purpose IN ('ask', 'write') AND asked_at IS NULL"
)
_ADD_SHOWING = (
    "INSERT INTO showings (nonce, item, labeller, repeat, side, guideline, shown_at, expires_at) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
