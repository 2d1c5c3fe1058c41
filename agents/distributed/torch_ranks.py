"""`lmgym.ranks.Ranks` over `torch.distributed`, with errors that name the rank at fault."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions

from lmgym.ranks import RankFailed

START = 300.0
"""Seconds that the first exchange may take at least: before it, each rank loads its model."""
BEAT = 0.5
"""Seconds after which a rank that waits for the others says so in the store."""


class TorchRanks:
    """The processes of a group of `torch.distributed`.

    The group is not torch's default one: with that, transformers writes files on rank 0 alone, and other libraries
    change their ways too.

    A rank that dies closes its connections, so that the others see it immediately. One that hangs is seen when an
    exchange has waited for the group's timeout. Who is at fault is read from the store: every rank says there which
    exchange it waits in, and with which error it stops.

    Args:
        store: where the ranks met: a `torch.distributed.Store`.
        rank: the number of this process.
        world: how many there are.
        groups: for each type of device, the group by which its tensors go.
        timeout: seconds that an exchange may take.
    """

    def __init__(self, store: Any, rank: int, world: int, groups: Mapping[str, Any], timeout: float):
        self.rank, self.world, self.timeout = rank, world, timeout
        self._groups = dict(groups)
        self._store = store.clone()  # the thread has a connection of its own
        self._entered, self._since = 0, 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def sum(self, x: Tensor) -> Tensor:
        """Replaces `x` by its sum over the ranks, and returns it."""
        with self._exchange():
            options = AllreduceOptions()
            options.timeout = self._patience
            self._groups[x.device.type].allreduce([x], options).wait()
        return x

    def gather(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The rows of all ranks, those of rank 0 first."""
        if counts is None:
            found = torch.zeros(self.world, dtype=torch.int64)
            found[self.rank] = len(rows)
            counts = self.sum(found).tolist()
        most = max(counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        found = rows.new_empty(self.world * most, *rows.shape[1:])
        with self._exchange():
            options = AllgatherOptions()
            options.timeout = self._patience
            self._groups[rows.device.type].allgather([list(found.split(most))], [padded], options).wait()
        if min(counts) == most:
            return found
        return torch.cat([found[rank * most : rank * most + count] for rank, count in enumerate(counts)])

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        self.sum(torch.zeros(1))

    def fail(self, message: str) -> bool:
        """Tells the other ranks the error with which this one stops.

        Returns:
            Whether this rank should show it: not if rank 0 stops with the same one.
        """
        with suppress(RuntimeError):  # the store is gone, if the process that held it is
            self._store.set(f"lmgym/error/{self.rank}", message)
            if self.rank > 0 and _soon(lambda: self._read("error", 0)) == message:
                return False
            self._store.set(f"lmgym/seen/{self.rank}", "yes")
        return True

    def close(self) -> None:
        """Ends the threads of this rank: the one that reports where it is, and those of the groups.

        The threads of a group may need the interpreter to free a tensor. One that asked for it while Python exits
        would abort the process, so they end here.
        """
        self._end.set()
        self._thread.join()
        self._groups.clear()

    @property
    def _patience(self) -> timedelta:
        return timedelta(seconds=self.timeout if self._entered > 1 else max(START, self.timeout))

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        self._entered, self._since = self._entered + 1, time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise self._diagnosis(str(error)) from error
        finally:
            self._since = 0.0

    def _beat(self) -> None:
        """Says in the store that this rank waits in an exchange, if it does for long."""
        said = 0
        while not self._end.wait(BEAT):
            entered, since = self._entered, self._since
            if since and entered > said and time.monotonic() - since > BEAT:
                self._store.set(f"lmgym/waits/{self.rank}", str(entered))
                said = entered

    def _diagnosis(self, error: str) -> RankFailed:
        """Which rank is at fault."""
        try:
            self._store.set(f"lmgym/waits/{self.rank}", str(self._entered))
            time.sleep(4 * BEAT)  # until the others have said that they wait, or why they stop
            for rank in range(self.world):
                if rank != self.rank and (message := self._read("error", rank)):
                    return RankFailed(f"rank {rank} stopped: {message}", bool(self._read("seen", rank)))
            absent = [rank for rank in range(self.world) if int(self._read("waits", rank) or 0) < self._entered]
        except RuntimeError:  # the store is gone, and with it the process that held it
            absent = []
        first = (error.splitlines() or [""])[0][:200]
        if not absent:
            if "imed out" in first:
                return RankFailed(
                    f"an exchange between the ranks took longer than --rank-timeout {self.timeout:g} s, because one of "
                    "them came late: give more seconds"
                )
            return RankFailed(f"the exchange between the ranks failed: the launcher or a rank has ended ({first})")
        names = f"rank {absent[0]}" if len(absent) == 1 else f"the ranks {', '.join(map(str, absent))}"
        return RankFailed(
            f"{names} did not answer: killed (perhaps because memory ran out), or busy with something else for longer "
            f"than --rank-timeout {self.timeout:g} s"
        )

    def _read(self, what: str, rank: int) -> str:
        key = f"lmgym/{what}/{rank}"
        return self._store.get(key).decode(errors="replace") if self._store.check([key]) else ""


def _soon(read: Callable[[], str], seconds: float = 2.0) -> str:
    """What `read` gives, as soon as that is not empty; empty if it stays so for some seconds."""
    end = time.monotonic() + seconds
    while not (found := read()) and time.monotonic() < end:
        time.sleep(0.05)
    return found
