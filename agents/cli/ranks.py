"""A command on several processes: started here (--procs), or by torchrun, `accelerate launch` or Slurm.

Imports no torch before it knows that there are several.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from agents.cli.commands import RECORDED, run_command
from agents.cli.options import last_value
from lmgym.io import printable

Described = Callable[[BaseException], tuple[str, int]]
"""The message and the exit status of an error that ends a command; raises other errors again."""


def launched() -> bool:
    """Whether a launcher started this process as one of several ranks."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1") and "RANK" in os.environ


def run_on_ranks(command: str, argv: Sequence[str], describe: Described) -> int | None:
    """Runs a command on several ranks, if that is asked for; returns the exit status, or None if it is not.

    Args:
        command: the name of the command.
        argv: its command line.
        describe: describes an error.

    Raises:
        ValueError: the command cannot run on several ranks, or their number is not a number.
    """
    if not launched():
        return run_on_new_processes(command, argv)
    if command not in RECORDED:
        world = os.environ["WORLD_SIZE"]
        raise ValueError(f"lmgym {command} runs on one process, and {world} were started: leave out the launcher")
    return _as_rank(command, argv, describe)


def run_on_new_processes(command: str, argv: Sequence[str]) -> int | None:
    """Runs a command on the processes that --procs asks for; returns the exit status, or None if it is one.

    Raises:
        ValueError: it is not a number, or there are fewer cores.
    """
    procs = _wanted(argv) if command in RECORDED else 1
    if procs == 1:
        return None
    from agents.distributed import launch

    status, said = launch("agents.cli", [command, *argv], procs)
    if said:
        print(f"lmgym: {said}", file=sys.stderr)
    return status


def _wanted(argv: Sequence[str]) -> int:
    """The number of processes that the command line asks for, or the run that it continues."""
    resumed = last_value(argv, "--resume")
    if resumed is not None:
        try:
            recorded = json.loads((Path(resumed) / "config.json").read_bytes())["arguments"]
            argv = [*map(str, recorded), *argv]
        except (OSError, ValueError, TypeError, KeyError):
            pass  # the command itself says what is wrong with the folder
    given = last_value(argv, "--procs") or "1"
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"--procs {given} is not a number of processes: give 1 or more")
    return int(given)


def _as_rank(command: str, argv: Sequence[str], describe: Described) -> int:
    """Runs a command as one of several ranks. Only rank 0 speaks, but for an error that another rank alone has."""
    from agents.distributed import TIMEOUT, joined
    from lmgym.ranks import RankFailed

    given = last_value(argv, "--rank-timeout")
    try:
        timeout = float(given) if given else TIMEOUT
    except ValueError:
        timeout = TIMEOUT  # the parser of the options refuses it, with a better message
    with joined(timeout) as ranks:
        try:
            with _silent(ranks.rank > 0):
                return run_command(command, argv)
        except SystemExit:
            raise
        except BaseException as error:
            seen = isinstance(error, RankFailed) and error.seen
            try:
                said, status = describe(error)
            except BaseException as unknown:
                ranks.fail(f"{type(unknown).__name__}: {unknown}")
                raise
            if not seen and ranks.fail(said):
                where = f"rank {ranks.rank}: " if ranks.rank else ""
                print(f"lmgym: {where}{printable(said)}", file=sys.stderr, flush=True)
            # The launcher stops the ranks that have not ended yet: this one ends with its own status.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            raise SystemExit(status) from None


@contextmanager
def _silent(silent: bool) -> Iterator[None]:
    """In the body, nothing is printed."""
    if not silent:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
