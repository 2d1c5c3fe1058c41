"""Simulated people who use the page over HTTP, as a browser would."""

import http.client
import json
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from agents.labelling.app import COOKIE
from lmgym.preferences import SimulatedLabeller

Scores = Callable[[str, Sequence[str]], Sequence[float]]
"""The scores of texts as the page shows them, given the prompt as the page shows it."""


class Client:
    """One browser.

    Args:
        link: of a labeller.

    Attributes:
        state: what the server answered last.
    """

    def __init__(self, link: str) -> None:
        parts = urlsplit(link)
        self.host, token = parts.netloc, parts.query.removeprefix("token=")
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=30)
        self._headers = {"Cookie": f"{COOKIE}={token}", "Origin": f"http://{parts.netloc}"}
        self.state = self.request("GET", "/api/state")
        self._headers["X-CSRF-Token"] = self.state["csrf"]

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON of a response.

        Raises:
            OSError: the server does not answer.
            ValueError: it refuses.
        """
        data = None if body is None else json.dumps(body).encode()
        more = {} if data is None else {"Content-Type": "application/json"}
        try:
            self._connection.request(method, path, data, self._headers | more)
            response = self._connection.getresponse()
            found = json.loads(response.read())
        except http.client.HTTPException as error:
            raise ConnectionError(f"the server ended the connection ({error!r})") from error
        if response.status != 200:
            raise ValueError(f"{path}: status {response.status}: {found.get('error')}")
        return found

    def answer(self, choice: str, **more: Any) -> dict[str, Any]:
        """Answers the present question; the state is then the next one."""
        body = {"nonce": self.state["item"]["nonce"], "choice": choice, **more}
        self.state = self.request("POST", "/api/answer", body)
        return self.state

    def undo(self) -> dict[str, Any]:
        """Takes the last answer back."""
        self.state = self.request("POST", "/api/undo", {"event": self.state["latest"]})
        return self.state

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()


def label_over_http(
    link: str, labeller: SimulatedLabeller, scores: Scores, seed: int | Sequence[int], most: int | None = None
) -> int:
    """Answers all questions, but at most `most`.

    Args:
        link: of the labeller.
        labeller: how they choose.
        scores: what they think of the texts.
        seed: of their random numbers.
        most: answers; None: all.

    Returns:
        The number of answers.
    """
    client, rng, answered = Client(link), np.random.default_rng(seed), 0
    while client.state["item"] is not None and (most is None or answered < most):
        item = client.state["item"]
        prompt = item["prompt"] or "\n".join(f"{role}: {content}" for role, content in item["messages"])
        client.answer(**labeller.choose(scores(prompt, item["texts"]), rng, answered), ms=1.0)  # pyright: ignore[reportArgumentType]
        answered += 1
    client.close()
    return answered
