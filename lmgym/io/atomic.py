"""Atomic writes of files and folders, and a file to which lines are appended.

Data is written to a temporary path next to the target, flushed to the disk, and renamed. If something fails (the disk
is full, the process is killed, the power fails), readers find the old version or the new one, never a mixture.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

REMEDIES = {
    errno.ENOSPC: "free some space on the disk",
    errno.EDQUOT: "the disk quota is used up: free some space",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "the disk is read-only: choose another folder",
    errno.ENOENT: "the folder no longer exists: check whether it was moved or removed",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder",
    errno.EIO: "the disk reports an input/output error: check the disk",
}


class WriteError(OSError):
    """A file or folder could not be written. The message names it and says what to do."""


def write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file atomically, or replaces it.

    Raises:
        WriteError: it could not be written; the previous version is unchanged.
    """
    path = Path(path)
    with staged(path) as aside, named_errors(path):
        file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            _write_all(file, data.encode() if isinstance(data, str) else data)
        finally:
            os.close(file)


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path. The body writes a file or a folder there, which then replaces `path`.

    Raises:
        WriteError: it could not be written; the previous version is unchanged.
    """
    path = Path(path)
    aside, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    with named_errors(path):
        _remove(aside)
    try:
        yield aside
        with named_errors(path):
            _sync(aside)
            if path.is_dir() and not path.is_symlink():  # os.replace cannot replace a folder that has files
                _remove(old)
                os.rename(path, old)
            os.replace(aside, path)
            _sync_one(path.parent)
            _remove(old)
    except BaseException:
        with suppress(OSError):
            if old.exists() and not path.exists():
                os.rename(old, path)
            _remove(aside)
        raise


def write_folder(path: str | os.PathLike[str], writer: Callable[[Path], object]) -> None:
    """Writes a folder atomically, or replaces it.

    Args:
        path: the folder.
        writer: writes the contents. It gets the path of an empty temporary folder.

    Raises:
        WriteError: it could not be written.
    """
    path = Path(path)
    with staged(path) as aside, named_errors(path):
        os.mkdir(aside)
        writer(aside)


def make_folder(path: str | os.PathLike[str], parents: bool = False) -> None:
    """Makes a folder, unless it exists; with `parents`, its parent folders too.

    Raises:
        WriteError: it could not be made.
    """
    with named_errors(Path(path)):
        if parents:
            os.makedirs(path, exist_ok=True)
        elif not os.path.isdir(path):
            os.mkdir(path)


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder, as hexadecimal digits."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
    return whole.hexdigest()


class LineWriter:
    """A text file to which lines are appended without buffering.

    Args:
        path: the file; it is created if needed.
        length: truncate the file to this number of bytes; None keeps all.

    Raises:
        WriteError: the file cannot be opened.
        ValueError: the file is shorter than `length`.
    """

    def __init__(self, path: str | os.PathLike[str], length: int | None = None):
        self.path = Path(path)
        with named_errors(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self.length = os.fstat(self._file).st_size
            if length is not None and length != self.length:
                if length > self.length:
                    raise ValueError(f"{str(self.path)!r} has {self.length} bytes, but had {length}: lines are missing")
                os.ftruncate(self._file, length)
                self.length = length

    def append(self, line: str) -> None:
        """Appends a line.

        Raises:
            WriteError: it could not be written; the previous lines are unchanged.
        """
        data = f"{line}\n".encode()
        try:
            with named_errors(self.path):
                _write_all(self._file, data)
        except WriteError:
            with suppress(OSError):
                os.ftruncate(self._file, self.length)
            raise
        self.length += len(data)

    def sync(self) -> None:
        """Flushes all lines to the disk (fsync)."""
        with named_errors(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        with named_errors(self.path):
            os.close(self._file)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns an operating-system error into a `WriteError` that names the path and says what to do."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        reason = os.strerror(number) if number else str(error)
        remedy = REMEDIES.get(number or 0, "")
        raise WriteError(f"cannot write {str(path)!r} ({reason}){f': {remedy}' if remedy else ''}") from error


def _number_in(text: str) -> int | None:
    """The system's error number in a message such as "… (os error 28)"; None if it has none."""
    _, found, rest = text.partition("os error ")
    digits = rest.partition(")")[0]
    return int(digits) if found and digits.isdigit() else None


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync(path: Path) -> None:
    """Flushes a file, or a folder with all its contents, to the disk (fsync)."""
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        _sync(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
