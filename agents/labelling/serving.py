"""Serves the page until it is stopped."""

import errno
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Sequence

import uvicorn

from agents.labelling.app import Page, make_app
from lmgym.preferences import LabelStore

POLL = 0.5
"""Seconds between two looks at whether the server shall end."""


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Args:
        host: an address of this machine.
        port: 0 takes any that is free.

    Raises:
        ValueError: the port is in use, or the address is not one of this machine.
    """
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError as error:
        raise ValueError(f"--host {host} is not an IP address: give 127.0.0.1, or this machine's address") from error
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; otherwise a response takes 40 ms more.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((str(address), port))
        found.listen(256)
    except OSError as error:
        found.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} is in use: give another one with --port, or 0 for any that is free"
            ) from error
        raise ValueError(f"cannot listen on {host}, port {port} ({error.strerror}): give --host and --port") from error
    return found


def links(store: LabelStore, labellers: Sequence[int], host: str, port: int) -> list[str]:
    """The link of each labeller. Whoever has it labels in that name."""
    if ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_unspecified:
        host = own_address()
    name = f"[{host}]" if ":" in host else host
    return [f"http://{name}:{port}/?token={store.token(labeller)}" for labeller in labellers]


def own_address() -> str:
    """This machine's address in its network; 127.0.0.1 if it is in none. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address for documentation, RFC 5737
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"


def serve(page: Page, socket_: socket.socket, until: Callable[[], bool] | None = None) -> None:
    """Serves the page until the process is told to stop (Ctrl-C, SIGTERM), or until `until()` is true.

    Answers that are under way are finished and written.
    """
    config = uvicorn.Config(
        make_app(page), log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=5,
        ws="none", lifespan="off", loop="asyncio", http="httptools",
    )  # fmt: skip
    server = uvicorn.Server(config)

    def watch() -> None:
        while not server.should_exit:
            time.sleep(POLL)
            server.should_exit |= until is not None and until()

    if until is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        server.run(sockets=[socket_])
    except KeyboardInterrupt:
        pass  # uvicorn raises it again after it has finished
    finally:
        page.writer.close()
