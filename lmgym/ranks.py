"""Data parallelism: which processes work on the same run, and which share of the rows is this process's.

A rank is one of W processes that run the same program on the same data. `collect` and the learner ask `current()` for
the ranks. By default there is one, and nothing is exchanged; `agents.distributed` has those of `torch.distributed`.
Every rank holds every row of a rollout. Only the work is split: each decodes and scores its own rows, and takes its
share of the passes of a step.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Ranks(Protocol):
    """The processes of a run. All of them call the same methods in the same order.

    Attributes:
        rank: the number of this process, from 0.
        world: W, how many there are.
    """

    @property
    def rank(self) -> int: ...
    @property
    def world(self) -> int: ...
    def sum(self, x: Tensor) -> Tensor:
        """Replaces `x` by its sum over the ranks, which is the same to the bit on each of them, and returns it."""
        ...

    def gather(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The rows of all ranks, those of rank 0 first.

        Args:
            rows: [N, ...] of this rank.
            counts: N of each rank, if it is known; otherwise the ranks exchange it first.
        """
        ...

    def barrier(self) -> None:
        """Waits until every rank has come here."""
        ...


class RankFailed(RuntimeError):
    """Another rank died, hangs, or stopped with an error; the message names it.

    Attributes:
        seen: whether that rank has shown its error itself.
    """

    def __init__(self, message: str, seen: bool = False):
        super().__init__(message)
        self.seen = seen


class _One:
    """A single process."""

    rank, world = 0, 1

    def sum(self, x: Tensor) -> Tensor:
        return x

    def gather(self, rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        return rows

    def barrier(self) -> None:
        pass


_ONE = _One()
_current: ContextVar[Ranks] = ContextVar("ranks", default=_ONE)


def one() -> Ranks:
    """The ranks of a run of a single process."""
    return _ONE


def current() -> Ranks:
    """The ranks of this run."""
    return _current.get()


@contextmanager
def using(ranks: Ranks) -> Iterator[Ranks]:
    """Makes these the `current` ranks while the body runs."""
    before = _current.set(ranks)
    try:
        yield ranks
    finally:
        _current.reset(before)


# Shares of the work --------------------------------------------------------------------------------------------------


def shares(count: int, world: int, unit: int = 1) -> list[slice]:
    """`count` rows cut into one block for each rank, of which the sizes differ by at most one unit.

    Args:
        count: the number of rows; it need not be divisible.
        world: W. If there are fewer rows than ranks, some blocks are empty.
        unit: rows that stay together, such as the samples of a prompt, if there are enough of these units.
    """
    unit = unit if count % unit == 0 and count // unit >= world else 1
    cuts = [unit * (count // unit * rank // world) for rank in range(world + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def balanced(sizes: Sequence[int], world: int) -> list[list[int]]:
    """The items of each rank, so that ranks have about the same sum of sizes: dealt from the largest, back and forth.

    Every item is in exactly one list; the lists are in order.
    """
    dealt: list[list[int]] = [[] for _ in range(world)]
    order = [*range(world), *reversed(range(world))]
    for place, item in enumerate(sorted(range(len(sizes)), key=lambda item: -sizes[item])):
        dealt[order[place % len(order)]].append(item)
    return [sorted(items) for items in dealt]


# Exchanges -----------------------------------------------------------------------------------------------------------


def gather_blocks(ranks: Ranks, wholes: Sequence[Tensor], blocks: Sequence[slice]) -> None:
    """Completes tensors of which each rank has filled its block of rows, in one exchange.

    Args:
        ranks: the ranks.
        wholes: [B, ...] each; written in place. They may have any types.
        blocks: the rows of each rank.
    """
    mine = blocks[ranks.rank]
    packed = ranks.gather(
        torch.cat([_as_bytes(whole[mine]) for whole in wholes], 1), [rows.stop - rows.start for rows in blocks]
    )
    at = 0
    for whole in wholes:
        width = math.prod(whole.shape[1:]) * whole.element_size()
        part = packed[:, at : at + width].clone(memory_format=torch.contiguous_format).view(whole.dtype)
        whole.copy_(part.view(whole.shape))
        at += width


def _as_bytes(rows: Tensor) -> Tensor:
    """[N, ...] as bytes [N, K]."""
    flat = rows.reshape(len(rows), math.prod(rows.shape[1:])).contiguous()
    return flat.view(torch.uint8)


def in_shares(function: Callable[..., Sequence[Any]], *columns: Sequence[Any]) -> Sequence[Any]:
    """The numbers of a function that gives one for each row, such as a score; each rank asks it for its rows alone."""
    ranks = current()
    if ranks.world == 1:
        return function(*columns)
    own = shares(len(columns[0]), ranks.world)[ranks.rank]
    found = [float(number) for number in function(*(column[own] for column in columns))] if own.stop > own.start else []
    return [number for part in gather_data(found, ranks) for number in part]


def gather_data(value: Any, ranks: Ranks | None = None) -> list[Any]:
    """The values of all ranks, in order. They are plain data: what JSON can hold."""
    ranks = ranks or current()
    if ranks.world == 1:
        return [value]
    # A line of JSON has no line break. Nothing is pickled.
    line = bytearray(json.dumps(value).encode() + b"\n")
    lines = bytes(ranks.gather(torch.frombuffer(line, dtype=torch.uint8)).tolist())
    return [json.loads(text) for text in lines.splitlines()]


def tell(value: Any, ranks: Ranks | None = None) -> Any:
    """The value of rank 0, which decides; what other ranks pass is ignored."""
    ranks = ranks or current()
    return gather_data(value if ranks.rank == 0 else None, ranks)[0]


def same(value: Any, ranks: Ranks | None = None) -> bool:
    """Whether all ranks have the same value; plain data, such as a digest."""
    values = gather_data(value, ranks)
    return all(other == values[0] for other in values)
