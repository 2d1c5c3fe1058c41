"""Joining the ranks that a launcher started: torchrun, `accelerate launch`, Slurm, or `lmgym train --procs`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from agents.distributed.torch_ranks import START, TorchRanks
from lmgym.ranks import using

TIMEOUT = 60.0
"""Seconds that a rank waits for the others, by default."""
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in the environment of each rank."""


@contextmanager
def joined(timeout: float = TIMEOUT) -> Iterator[TorchRanks]:
    """Joins the other ranks, which are `lmgym.ranks.current()` while the body runs.

    With CUDA, each rank takes the GPU of its number on its machine. Tensors on a CPU go by gloo, those on a GPU by
    NCCL.

    Args:
        timeout: seconds that a rank waits for the others in an exchange, before it stops with an error.

    Raises:
        ValueError: the launcher's variables are missing or malformed, the port is in use, there are too few GPUs, or
            the ranks did not meet.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ValueError(
            f"{missing[0]} is not set, so this process cannot find the other ranks: start it with torchrun, "
            "`accelerate launch` or `lmgym train --procs N` (docs/scaling.md)"
        )
    ranks = _meet(timeout)
    try:
        with using(ranks):
            yield ranks
            ranks.barrier()
    finally:
        ranks.close()


def _meet(timeout: float) -> TorchRanks:
    patience = timedelta(seconds=max(timeout, START))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world = next(rendezvous("env://", timeout=patience))
        store = PrefixStore("lmgym", store)
        groups: dict[str, Any] = {"cpu": dist.ProcessGroupGloo(PrefixStore("cpu", store), rank, world, patience)}
    except (RuntimeError, ValueError) as error:  # torch's DistNetworkError and DistStoreError are RuntimeErrors
        said = " ".join(str(error).split())
        if "EADDRINUSE" in said or "address already in use" in said:
            raise ValueError(f"the port of {address} is in use: set MASTER_PORT to a free one") from error
        raise ValueError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {address} within "
            f"{patience.seconds} s ({said[:300]}): check that all ranks were started, and that the address "
            "can be reached"
        ) from error
    if torch.cuda.is_available():
        own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if own >= gpus:
            raise ValueError(f"rank {own} of this machine has no GPU of its own, because there are {gpus}: start fewer")
        torch.cuda.set_device(own)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        groups["cuda"] = dist.ProcessGroupNCCL(PrefixStore("cuda", store), rank, world, options)
    return TorchRanks(store, rank, world, groups, timeout)
