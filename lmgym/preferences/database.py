"""The SQLite file of labels: its tables, how it is opened, and which errors people can mend."""

import errno
import os
import secrets
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = "1"
"""Of the tables below; a file of another version is refused."""
NETWORK = (
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "glusterfs", "lustre", "gpfs", "beegfs",
    "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.rclone", "davfs", "ncpfs", "webdav", "afpfs",
)  # fmt: skip
"""Kinds of file systems on which SQLite's locks do not hold (https://www.sqlite.org/howtocorrupt.html, section 2)."""

SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE guidelines (version INTEGER PRIMARY KEY, text TEXT NOT NULL, added_at REAL NOT NULL);
CREATE TABLE labellers (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, role TEXT NOT NULL, added_at REAL NOT NULL, withdrawn_at REAL);
CREATE TABLE withdrawals (labeller INTEGER PRIMARY KEY, at REAL NOT NULL, events INTEGER NOT NULL);
-- What can be asked. `asked_at`, `strategy` and `propensity` are set when an item is first chosen; `labels` counts who
-- has answered it and did not skip it.
CREATE TABLE items (
    id INTEGER PRIMARY KEY, purpose TEXT NOT NULL, prompt TEXT NOT NULL, messages TEXT NOT NULL, texts TEXT NOT NULL,
    best INTEGER, explanation TEXT NOT NULL, source TEXT NOT NULL, model TEXT NOT NULL, split TEXT NOT NULL,
    batch INTEGER NOT NULL, added_at REAL NOT NULL,
    asked_at REAL, strategy TEXT, propensity REAL, labels INTEGER NOT NULL DEFAULT 0);
CREATE INDEX never_asked ON items (purpose, split, batch, labels) WHERE asked_at IS NULL;
CREATE INDEX begun ON items (labels, asked_at, purpose) WHERE asked_at IS NOT NULL;
CREATE INDEX counted ON items (purpose, labels);
-- What was shown to whom. An item is reserved until `expires_at`; `answered` is whether an answer has come.
CREATE TABLE showings (
    nonce TEXT PRIMARY KEY, item INTEGER NOT NULL, labeller INTEGER NOT NULL, repeat INTEGER NOT NULL,
    side TEXT NOT NULL, guideline INTEGER NOT NULL, shown_at REAL NOT NULL, expires_at REAL NOT NULL,
    answered INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE INDEX open_showings ON showings (answered, labeller);
CREATE INDEX reserved ON showings (item) WHERE answered = 0;
-- Every answer and every undo. Rows are never changed; they are deleted only when a labeller withdraws.
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, item INTEGER NOT NULL, labeller INTEGER NOT NULL, answer TEXT NOT NULL,
    detail TEXT NOT NULL, strength INTEGER, side TEXT NOT NULL, repeat INTEGER NOT NULL, nonce TEXT UNIQUE,
    shown_at REAL, answered_at REAL NOT NULL, client_ms REAL, guideline INTEGER NOT NULL, model TEXT NOT NULL,
    undo_of INTEGER UNIQUE);
CREATE INDEX events_of_labeller ON events (labeller, item);
CREATE INDEX events_of_item ON events (item);
CREATE TRIGGER events_never_change BEFORE UPDATE ON events
    BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER events_stay BEFORE DELETE ON events
    WHEN NOT EXISTS (SELECT 1 FROM withdrawals WHERE labeller = OLD.labeller)
    BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
-- The label that counts: the answer that was not undone.
CREATE VIEW labels AS SELECT * FROM events AS e
    WHERE answer != 'undo' AND NOT EXISTS (SELECT 1 FROM events AS u WHERE u.undo_of = e.id);
-- Scores of texts by members of an ensemble of reward models, and what each training found.
CREATE TABLE scores (item INTEGER NOT NULL, member INTEGER NOT NULL, scores TEXT NOT NULL,
    PRIMARY KEY (item, member)) WITHOUT ROWID;
CREATE TABLE trainings (id INTEGER PRIMARY KEY, at REAL NOT NULL, labels INTEGER NOT NULL, model TEXT NOT NULL,
    right INTEGER NOT NULL, pairs INTEGER NOT NULL);
"""


class StoreError(OSError):
    """The file of labels could not be opened or written. The message names it and says what to do."""


def connect(path: Path, create: bool) -> sqlite3.Connection:
    """Opens the file, or makes it with empty tables and a secret key of its own.

    The journal is write-ahead and every commit is flushed to the disk (`synchronous=FULL`). Deleted rows are
    overwritten (`secure_delete`).

    Raises:
        StoreError: the file is absent, is not one of labels, is on a network disk, or cannot be opened.
    """
    if not create and not path.is_file():
        raise StoreError(f"{path}: no such file of labels; `lmgym label` makes one (working folder: {Path.cwd()})")
    kind = disk_kind(path)
    if kind in NETWORK:
        raise StoreError(
            f"{path} is on a network disk ({kind}), where locks do not hold and answers could be lost: give a file on "
            "a local disk with --db"
        )
    with named_errors(path):
        new = not path.exists() or path.stat().st_size == 0
        if new:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # it holds the key of all links
        connection = sqlite3.connect(path, timeout=20, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA secure_delete = ON")
            _make_tables(connection, path)
        except BaseException:
            connection.close()
            raise
    connection.row_factory = sqlite3.Row
    return connection


def _make_tables(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables in a file that has none; refuses a file of something else."""
    connection.execute("BEGIN IMMEDIATE")
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
    if names and "events" not in names:
        connection.execute("ROLLBACK")
        raise StoreError(f"{path} is a database of something else: give a new file with --db")
    if not names:
        for statement in _statements(SCHEMA):
            connection.execute(statement)
        values = (("version", VERSION), ("secret", secrets.token_hex(32)))
        connection.executemany("INSERT INTO meta VALUES (?, ?)", values)
    connection.execute("COMMIT")
    (version,) = connection.execute("SELECT value FROM meta WHERE key = 'version'").fetchone()
    if version != VERSION:
        raise StoreError(f"{path} was written by another version of lmgym (tables {version}, not {VERSION})")


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; `executescript` would commit the transaction first."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns an error of SQLite or of the system into one that names the file and says what to do."""
    try:
        yield
    except StoreError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"{path}: {_reason(error)}. Nothing that was acknowledged is lost") from error


def _reason(error: Exception) -> str:
    said = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if "disk is full" in said or number in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full: free some space; the page sends unsaved answers again"
    if "readonly" in said or "unable to open" in said or number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot be written ({said}): give a file in a folder that you may write to with --db"
    if number == errno.ENOENT:
        return "its folder does not exist: make it, or give another file with --db"
    if "not a database" in said or "malformed" in said:
        return f"not a SQLite file, or a damaged one ({said}): give another file, or restore a copy of this one"
    if "locked" in said:
        return "another program holds the file: end it, then try again"
    return f"cannot be used ({said})"


def disk_kind(path: Path, mounts: str | None = None) -> str:
    """The kind of the file system that holds a path, such as "ext4"; "" where the system does not say.

    Args:
        path: the file, which need not exist.
        mounts: lines as in /proc/mounts; by default those of this machine.
    """
    where = path.resolve()
    if sys.platform == "win32" and str(where).startswith("\\\\"):
        return "smbfs"
    if mounts is None:
        try:
            mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    found, kind = -1, ""
    for line in mounts.splitlines():
        point, this = line.split(" ")[1:3]
        folder = Path(point.replace("\\040", " "))
        if where.is_relative_to(folder) and len(folder.parts) >= found:  # of two on one folder, the later one counts
            found, kind = len(folder.parts), this
    return kind
