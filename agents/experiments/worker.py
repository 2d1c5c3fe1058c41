"""The worker process: runs one cell after another, until its parent closes the connection or dies.

It imports no torch of its own, so that it starts fast.
"""

import faulthandler
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from agents.experiments.cells import Cell

MAX_ERROR = 8000
"""Maximum characters of a traceback in a row; of a longer one, the end counts."""


def main(connection: Connection, function: str, threads: int, log: str) -> None:
    """What a worker process runs.

    Args:
        connection: gives the data of cells, and receives ("ready" | "unusable", text) once, then an outcome for each.
        function: "module:function".
        threads: number of threads for torch.
        log: the file that gets what the cells print.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # a group of its own: Ctrl-C reaches only the parent, and a kill reaches the cell's own processes
    threading.Thread(target=_die_with_parent, daemon=True).start()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.enable()
    try:
        run = load_function(function)
    except ValueError as error:
        connection.send(("unusable", str(error)))
        return
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    connection.send(("ready", ""))
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            connection.send(_outcome(run, Cell.from_data(connection.recv())))


def load_function(name: str) -> Callable[[Cell], dict[str, Any]]:
    """The function "module:function".

    Raises:
        ValueError: there is no such module or function, or the module raises while it is imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r} must be MODULE:FUNCTION, the function that runs a cell")
    try:
        function: Callable[[Cell], dict[str, Any]] = getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise ValueError(f"cannot import {name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{name!r} is {type(function).__name__}, and must be a function that takes a cell")
    return function


def _outcome(run: Callable[[Cell], dict[str, Any]], cell: Cell) -> dict[str, Any]:
    """Runs a cell; its status, result, error and CPU seconds."""
    _seed_generators(cell.seed)
    began, error, result = time.process_time(), "", None
    try:
        result = run(cell)
        if not isinstance(result, dict):
            raise TypeError(f"the cell's result must be a dict, but it is {type(result).__name__}")
        try:
            result = json.loads(json.dumps(result, allow_nan=False))
        except (TypeError, ValueError) as reason:
            raise ValueError(f"the cell's result must be JSON data, with finite numbers: {reason}") from reason
    except BaseException:  # also sys.exit: the other cells go on
        error, result = traceback.format_exc()[-MAX_ERROR:], None
    status = "error" if error else "ok"
    return {"status": status, "result": result, "error": error, "cpu_seconds": time.process_time() - began}


def _seed_generators(seed: int) -> None:
    """Seeds the global generators: a cell must not depend on those that ran before it."""
    random.seed(seed)
    if {"numpy", "torch"} & set(sys.modules):
        importlib.import_module("agents.runs.randomness").seed_everything(seed)


def _die_with_parent() -> None:
    """Ends this process, and those that the cell started, when the parent is gone, even if it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
