"""Who may come in: hosts, origins, sizes, and the headers of every response."""

import ipaddress
import json
import socket
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

MOST_BYTES = 512 * 1024
"""Of a request's body."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}
"""Sent with every response."""


class Guard:
    """Lets requests through that this server's own page makes.

    - The host must be an IP address, "localhost" or this machine's name. A name that a stranger's DNS server sends here
      (DNS rebinding) is refused.
    - A POST must come from a page of this server (`Origin`) and hold JSON, which no form of another page can send.
    - A body is refused before it is read if it is too large.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.encode(): value.encode() for name, value in HEADERS.items()}
                message["headers"] = [(k, v) for k, v in message["headers"] if k not in own] + list(own.items())
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refuses(scope["method"], headers)
        if refusal is None:
            await self.app(scope, _limited(receive), send_safely)
            return
        status, said = refusal
        body = json.dumps({"error": said}).encode()
        start = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]}
        await send_safely(start)
        await send_safely({"type": "http.response.body", "body": body})

    def refuses(self, method: str, headers: Mapping[str, str]) -> tuple[int, str] | None:
        """The status and the reason why a request is refused; None if it is not."""
        host = headers.get("host", "")
        if not self.is_own_name(host):
            return 421, "this server does not answer to that host name: use the link that you were given"
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "only GET and POST"
        if headers.get("origin") not in (f"http://{host}", f"https://{host}"):
            return 403, "this request does not come from the labelling page"
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "send JSON"
        size = headers.get("content-length", "0")
        if not size.isdigit() or int(size) > MOST_BYTES:
            return 413, f"at most {MOST_BYTES // 1024} KiB"
        return None

    def is_own_name(self, host: str) -> bool:
        """Whether a Host header names this machine."""
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if name.lower().rstrip(".") in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _limited(receive: Receive) -> Receive:
    """The same, but ends a body that goes on after `MOST_BYTES`, whatever its header said."""
    taken = 0

    async def bounded() -> Any:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        return message if taken <= MOST_BYTES else {"type": "http.disconnect"}

    return bounded
