"""One thread that uses the store: calls that wait together share one commit, and so one flush to the disk."""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from lmgym.preferences import LabelStore, StoreError

Result = TypeVar("Result")
MOST = 64
"""Calls in one commit."""


class _Job(NamedTuple):
    call: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"


class Writer:
    """Runs calls on a store in a thread of its own.

    A flush takes milliseconds, and a class of thirty answers at once: each flush serves all calls that came while the
    last one ran. A call that raises undoes only what it did itself.
    """

    def __init__(self, store: LabelStore) -> None:
        self.store = store
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="labels", daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], Result]) -> Result:
        """Runs a call in a transaction; returns when what it wrote is on the disk.

        Raises:
            StoreError: it was not written.
        """
        loop = asyncio.get_running_loop()
        job = _Job(call, loop, loop.create_future())
        self._jobs.put(job)
        return await job.future

    def close(self) -> None:
        """Ends the thread after the calls that wait."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs, last = [job], False
            while len(jobs) < MOST and not last:
                try:
                    more = self._jobs.get_nowait()
                except queue.Empty:
                    break
                last = more is None
                jobs += [] if more is None else [more]
            for (_, loop, future), (value, error) in zip(jobs, self._together(jobs), strict=True):
                loop.call_soon_threadsafe(_resolve, future, value, error)
            if last:
                return

    def _together(self, jobs: list[_Job]) -> list[tuple[Any, Exception | None]]:
        """The result or the error of each job, after one commit."""
        outcomes: list[tuple[Any, Exception | None]] = []
        try:
            with self.store.transaction() as connection:
                for job in jobs:
                    try:
                        with self.store.transaction(apart=True):
                            outcomes.append((job.call(), None))
                    except Exception as error:
                        if not connection.in_transaction:  # a full disk: SQLite has undone the others too
                            raise
                        outcomes.append((None, error))
        except StoreError as error:
            return [(None, error)] * len(jobs)
        return outcomes


def _resolve(future: "asyncio.Future[Any]", value: Any, error: Exception | None) -> None:
    if future.cancelled():
        return  # the browser has gone; what it sent is written all the same
    if error is None:
        future.set_result(value)
    else:
        future.set_exception(error)
