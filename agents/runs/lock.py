"""One writer for a run's folder."""

from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from lmgym.io import atomic

LOCK_FILE = ".lock"


class FolderLock:
    """Holds a folder for this process. The system releases it when the process ends, even if it is killed.

    A file that a killed process leaves behind is harmless: the lock is on the open file, not on its existence.

    Args:
        folder: an existing folder.
        name: the lock's file: several may lock parts of a folder.

    Raises:
        ValueError: another process holds the folder.
        lmgym.io.atomic.WriteError: the lock file cannot be opened.
    """

    def __init__(self, folder: Path, name: str = LOCK_FILE):
        self.path = folder / name
        self._lock = FileLock(self.path, timeout=0, thread_local=False)
        with atomic.named_errors(self.path):
            try:
                self._lock.acquire()
            except Timeout as error:
                raise ValueError(
                    f"another process is writing to {str(folder)!r}: wait until it ends, or choose another --out"
                ) from error

    def release(self) -> None:
        """Removes the lock file and releases the lock."""
        # While the lock is still held: whoever opened the file before sees that it is gone, and opens a new one.
        # Windows does not remove an open file; it stays there, which is harmless.
        with suppress(OSError):
            self.path.unlink()
        with suppress(OSError):
            self._lock.release()
