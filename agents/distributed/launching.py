"""Starting a command on several processes of this machine, as torchrun does."""

import logging
import os
import sys
import uuid
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def launch(module: str, arguments: Sequence[str], procs: int) -> tuple[int, str]:
    """Runs `python -m module arguments` as ranks on this machine, until all have ended.

    If one fails, the others are stopped. A signal to this process is passed on, so that a run saves its state.

    Args:
        module: the module to run.
        arguments: its command line.
        procs: the number of ranks.

    Returns:
        The exit status of the rank that ended first with an error, or 0; and what happened in words, if the rank
        cannot have said it.

    Raises:
        ValueError: this process may not use so many cores, or there are fewer GPUs.
    """
    _check(procs)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // procs)))
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=procs,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",  # a free port
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
    )
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the rank at fault says what happened
    try:
        elastic_launch(config, sys.executable)("-m", module, *arguments)
    except ChildFailedError as failed:
        rank, failure = min(failed.failures.items(), key=lambda item: item[1].timestamp)
        if failure.exitcode >= 0:
            return failure.exitcode, ""
        return 128 - failure.exitcode, f"rank {rank} was killed by {failure.signal_name()}"
    except SignalException as stopped:
        return 128 + stopped.sigval, ""
    return 0, ""


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(procs: int) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    most, what = (gpus, "GPUs") if gpus else (_cores(), "cores")
    if procs > most:
        raise ValueError(
            f"--procs {procs} is more than the {most} {what} that this process may use: give at most {most}"
        )
