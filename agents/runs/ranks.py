"""A run of several ranks: rank 0 has the folder, and decides; the others take the same way and write nothing."""

from collections.abc import Mapping
from typing import Any

import torch

from agents.runs.randomness import GlobalGenerators
from agents.runs.resume import differences
from agents.runs.stopping import TIME_LIMIT_STATUS, Stopped
from agents.training import State
from lmgym.ranks import current, gather_data

STATUSES = (143, 130, TIME_LIMIT_STATUS)
"""Exit statuses with which a run is stopped: by SIGTERM, by Ctrl-C, by its time limit."""
COMPARED = ("options", "inputs", "versions", "revision", "hardware", "threads")
"""Entries of config.json that must be the same on all ranks."""


def check_same_on_all_ranks(config: Mapping[str, Any]) -> None:
    """Refuses ranks that would not run the same: other options, files, versions, code or hardware.

    Raises:
        ValueError: it names the first difference, on every rank.
    """
    first, *others = gather_data({name: config[name] for name in COMPARED})
    for rank, other in enumerate(others, start=1):
        found = [d for name in COMPARED for d in differences(first[name], other[name], name)]
        if found:
            raise ValueError(
                f"the ranks do not run the same (there: rank 0, here: rank {rank}): {'; '.join(found[:3])}. Start all "
                "ranks with the same command, code and files, on machines of the same type"
            )


def agreed(due: bool, status: int | None) -> tuple[bool, int | None]:
    """What all ranks do: whether rank 0 wants a checkpoint, and the status with which any rank wants to stop."""
    ranks = current()
    if ranks.world == 1:
        return due, status
    decides = ranks.rank == 0
    wanted = [due and decides, *(status == s and (decides or s != TIME_LIMIT_STATUS) for s in STATUSES)]
    saves, *stops = ranks.sum(torch.tensor(wanted, dtype=torch.int32)).tolist()
    return bool(saves), next((s for s, count in zip(STATUSES, stops, strict=True) if count), None)


def generators_of_all_ranks() -> dict[str, State]:
    """The states of the global generators of each rank, as parts of a checkpoint."""
    own = GlobalGenerators().state()
    if current().world == 1:
        return {"random": own}
    plain = {name: [str(t.dtype).removeprefix("torch."), t.tolist()] for name, t in own.tensors.items()}
    found = {}
    for rank, (data, tensors) in enumerate(gather_data([own.data, plain])):
        restored = {name: torch.tensor(values, dtype=getattr(torch, kind)) for name, (kind, values) in tensors.items()}
        found[f"random of rank {rank}" if rank else "random"] = State(data, restored)
    return found


def wait_for_all(failure: object) -> None:
    """At the end of a run that all ranks end together: none is gone before the last has written."""
    if failure is None or isinstance(failure, Stopped):
        current().barrier()
