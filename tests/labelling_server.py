"""A server of the labelling page for tests: in a thread, or in processes that are killed.

    python tests/labelling_server.py DB PORT

Each line on standard input is answered by a new server process (its number is printed), which a test may kill.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from label_stores import PLAIN

from agents.labelling import Page, links, listening, serve
from lmgym.preferences import Asker, Item, LabelStore, Rules

SECRET = "5a" * 32


def store_at(path: Path, items: int = 0) -> LabelStore:
    """A new store whose key is known, so that the sides are the same in every test run."""
    store = LabelStore(path, create=True)
    store.set_meta("secret", SECRET)
    store.close()
    store = LabelStore(path)
    if items:
        store.add_items([Item(f"prompt {i}", (f"good {i}", f"bad {i}")) for i in range(items)])
    return store


@contextmanager
def served(store: LabelStore, rules: Rules = PLAIN, names: tuple[str, ...] = ("anna",)) -> Iterator[list[str]]:
    """Serves a store in a thread; yields the links: the owner's first."""
    ids = [store.labeller("owner", "owner"), *(store.labeller(name) for name in names)]
    listener, stop = listening("127.0.0.1", 0), threading.Event()
    page = Page(Asker(store, rules))
    thread = threading.Thread(target=serve, args=(page, listener, stop.is_set))
    thread.start()
    try:
        yield links(store, ids, "127.0.0.1", listener.getsockname()[1])
    finally:
        stop.set()
        thread.join()
        listener.close()


def _listening_again(port: int) -> socket.socket:
    """A socket at the port, which the process that was killed may still hold for a moment."""
    for _ in range(100):
        try:
            return listening("127.0.0.1", port)
        except ValueError:
            time.sleep(0.02)
    return listening("127.0.0.1", port)


def main(db: str, port: int) -> None:
    """Starts a server for each line."""
    while sys.stdin.readline():
        child = os.fork()
        if child == 0:
            serve(Page(Asker(LabelStore(db), PLAIN)), _listening_again(port))
            os._exit(0)
        print(child, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
