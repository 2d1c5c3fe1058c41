"""Files that are whole or not there: written aside, flushed to the disk, and renamed; and lines that are appended.

Whatever fails meanwhile (a full disk, a kill, a power cut), readers find the old file or the new one, never a mixture.
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
    errno.ENOENT: "the folder is gone: was it moved or removed meanwhile?",
    errno.ENOTDIR: "a file stands where a folder should be: choose another folder",
    errno.EIO: "the disk reports a fault",
}


class WriteError(OSError):
    """Something could not be written; the message names it and says what to do."""


def write(path: str | os.PathLike[str], data: str | bytes) -> None:
    """Writes a file, or replaces it.

    Raises:
        WriteError: it could not be written; what was there before is still there.
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
    """A path for the body to write a file or a folder to, which then takes the place of `path`.

    Raises:
        WriteError: it could not be written; what was there before is still there.
    """
    path = Path(path)
    aside, old = (path.with_name(f".{path.name}.{what}") for what in ("partial", "old"))
    with named_errors(path):
        _remove(aside)
    try:
        yield aside
        with named_errors(path):
            _sync(aside)
            if path.is_dir() and not path.is_symlink():  # a folder is not replaced by a rename
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
    """Writes a folder, or replaces it.

    Args:
        path: the folder.
        writer: writes what belongs into it into the empty folder that it is given.

    Raises:
        WriteError: it could not be written.
    """
    path = Path(path)
    with staged(path) as aside, named_errors(path):
        os.mkdir(aside)
        writer(aside)


def make_folder(path: str | os.PathLike[str], parents: bool = False) -> None:
    """Makes a folder where there is none yet; with `parents`, those that it is in too.

    Raises:
        WriteError: it could not be made.
    """
    with named_errors(Path(path)):
        if parents:
            os.makedirs(path, exist_ok=True)
        elif not os.path.isdir(path):
            os.mkdir(path)


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of all files of a folder and their names."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()}\0{digest(file)}\n".encode())
    return whole.hexdigest()


class LineWriter:
    """A text file to which lines are appended, each at once.

    Args:
        path: the file; made if needed.
        length: bytes of it that count; what follows is cut off. None keeps all.

    Raises:
        WriteError: it cannot be opened.
        ValueError: it is shorter than `length`.
    """

    def __init__(self, path: str | os.PathLike[str], length: int | None = None):
        self.path = Path(path)
        with named_errors(self.path):
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self.length = os.fstat(self._file).st_size
            if length is not None and length != self.length:
                if length > self.length:
                    raise ValueError(f"{str(self.path)!r} has {self.length} bytes, and had {length}: lines are missing")
                os.ftruncate(self._file, length)
                self.length = length

    def append(self, line: str) -> None:
        """Writes a line.

        Raises:
            WriteError: it could not be written; the lines before it are as they were.
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
        """Returns when all lines are on the disk."""
        with named_errors(self.path):
            os.fsync(self._file)

    def close(self) -> None:
        with named_errors(self.path):
            os.close(self._file)


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Turns an error of the system into one that names the path and says what to do."""
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
    """The system's error number in the words of another library ("… (os error 28)")."""
    _, found, rest = text.partition("os error ")
    digits = rest.partition(")")[0]
    return int(digits) if found and digits.isdigit() else None


def _write_all(file: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file, rest) :]


def _sync(path: Path) -> None:
    """Returns when a file, or a folder with all that is in it, is on the disk."""
    for inner in sorted(path.iterdir()) if path.is_dir() else ():
        _sync(inner)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
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
