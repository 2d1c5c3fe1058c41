"""The web application: one page, and the questions and answers behind it."""

import hmac
import math
import sys
import time
import unicodedata
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, Literal

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from agents.labelling.access import Guard
from agents.labelling.retraining import Retrainer
from agents.labelling.writer import Writer
from lmgym.io import parse_json, printable
from lmgym.preferences import (
    LONGEST,
    Asker,
    Figure,
    Item,
    LabelStats,
    LabelStore,
    Outcome,
    Showing,
    StoreError,
    label_stats,
)

COOKIE = "lmgym_label"
FRESH = 3.0
"""Seconds for which the figures of the page are not computed anew."""
HIDING = {*"\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029"}
"""Characters that reorder other text, or break lines where one does not see it."""
UNSAVED = "not saved: the disk is full or cannot be written. Your answer is sent again"
UNKNOWN = "this link does not hold (any more): ask for a new one"


Handler = Callable[[Request], Awaitable[Response]]


class _RefusedError(Exception):
    """A visitor who may not do this; the message is for them."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


@dataclass(frozen=True)
class _Visitor:
    """Who is at the page."""

    id: int
    name: str
    is_owner: bool


class Page:
    """The routes.

    Args:
        asker: hands out questions of its store.
        retrainer: trains a reward model in the background after so many labels; None: never.
        labels: the number of labels that the store has.

    Attributes:
        labels: the number of labels now.
    """

    def __init__(self, asker: Asker, retrainer: Retrainer | None = None, labels: int = 0) -> None:
        self.asker, self.store, self.retrainer = asker, asker.store, retrainer
        self.writer, self.labels = Writer(asker.store), labels
        self._figures: tuple[float, LabelStats] | None = None
        self._visitors: dict[str, _Visitor] = {}

    def routes(self) -> list[Route]:
        """What can be requested."""
        files = {"/": "page.html", "/page.js": "page.js", "/page.css": "page.css"}
        return [
            *(Route(path, partial(self.file, name=name)) for path, name in files.items()),
            Route("/favicon.ico", self.nothing),
            Route("/api/state", self.guarded(self.state)),
            Route("/api/stats", _as_json(self.stats)),
            Route("/api/answer", self.guarded(self.answer), methods=["POST"]),
            Route("/api/undo", self.guarded(self.undo), methods=["POST"]),
        ]

    # The page itself --------------------------------------------------------------------------------------------------

    async def file(self, request: Request, name: str) -> Response:
        """The page, its script and its style sheet. A link's token becomes a cookie, and leaves the address."""
        token = request.query_params.get("token")
        if token and name == "page.html":
            response: Response = RedirectResponse("/", 303)
            secure = request.url.scheme == "https"
            response.set_cookie(COOKIE, token, httponly=True, samesite="lax", secure=secure, max_age=30 * 86400)
            return response
        kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
        return Response(page_file(name), media_type=kinds[name.rpartition(".")[2]])

    async def nothing(self, request: Request) -> Response:
        """The answer to browsers that ask for an icon."""
        return Response(status_code=204)

    # Who asks ---------------------------------------------------------------------------------------------------------

    def guarded(self, route: Callable[[_Visitor, dict[str, Any]], dict[str, Any]]) -> Handler:
        """A route for those who have a link, run by the writer; a POST must show the page's own token too."""

        async def handled(request: Request) -> dict[str, Any]:
            body = await _body(request) if request.method == "POST" else {}
            token, csrf = request.cookies.get(COOKIE, ""), request.headers.get("x-csrf-token", "")

            def work() -> dict[str, Any]:
                visitor = self._find(token)
                if request.method == "POST" and not hmac.compare_digest(csrf.encode(), self.csrf(visitor).encode()):
                    raise _RefusedError(403, "reload the page: it is out of date")
                return route(visitor, body)

            found = await self.writer.run(work)
            self.labels = found["progress"]["all"]
            if self.retrainer is not None:
                self.retrainer.look(self.labels)
            return found

        return _as_json(handled)

    def _find(self, token: str) -> _Visitor:
        """The labeller whose link this is.

        Raises:
            _RefusedError: there is no such labeller, or they have withdrawn.
        """
        known = self._visitors.get(token)
        query = "SELECT id, name, role FROM labellers WHERE withdrawn_at IS NULL"
        if known is not None and self.store.rows(f"{query} AND id = ?", known.id):
            return known
        self._visitors.clear()
        for row in self.store.rows(query):
            own = self.store.token(row["id"])
            self._visitors[own] = _Visitor(row["id"], row["name"], row["role"] == "owner")
        if token not in self._visitors:
            raise _RefusedError(401, UNKNOWN)
        return self._visitors[token]

    def csrf(self, visitor: _Visitor) -> str:
        """What a POST of this visitor must show in the header X-CSRF-Token."""
        return self.store.digest("csrf", visitor.id).hex()

    # Questions and answers --------------------------------------------------------------------------------------------

    def state(self, visitor: _Visitor, body: dict[str, Any]) -> dict[str, Any]:
        """Everything that the page shows."""
        about = {"csrf": self.csrf(visitor), "name": shown(visitor.name)}
        about["guidelines"] = shown(self.store.guidelines()[1])
        return about | {"said": "Press ? for the keys."} | self._next(visitor)

    def answer(self, visitor: _Visitor, body: dict[str, Any]) -> dict[str, Any]:
        """Records an answer, and gives the next question. The status 200 says that the answer is on the disk."""
        given = {
            "nonce": _given(body, "nonce", str, ""),
            "choice": _given(body, "choice", str, ""),
            "ranking": _given(body, "ranking", list, []),
            "text": _given(body, "text", str, ""),
            "strength": _given(body, "strength", int, None),
            "client_ms": _given(body, "ms", float, None),
        }
        if not all(type(position) is int for position in given["ranking"]) or len(given["text"]) > LONGEST:
            raise ValueError(f"a ranking holds whole numbers, and a text at most {LONGEST:,} characters")
        outcome = self.asker.answer(visitor.id, **given)
        return {"said": _said(outcome), "told": outcome.right is not None} | self._next(visitor)

    def undo(self, visitor: _Visitor, body: dict[str, Any]) -> dict[str, Any]:
        """Takes an answer back, and shows its question again."""
        self.asker.undo(visitor.id, _given(body, "event", int, 0))
        return {"said": "Taken back: please answer again."} | self._next(visitor)

    def _next(self, visitor: _Visitor) -> dict[str, Any]:
        showing = self.asker.next(visitor.id)
        return {
            "item": None if showing is None else question(showing, self.asker.rules.strength),
            "title": "All done. Thank you!" if showing is None else TITLES[kind_of(showing.item)],
            "actions": actions(showing),
            "latest": self.asker.latest(visitor.id),
            "progress": self.asker.progress(visitor.id),
        }

    # Figures ----------------------------------------------------------------------------------------------------------

    async def stats(self, request: Request) -> dict[str, Any]:
        """The figures below the question; those of single labellers for the owner alone."""
        token = request.cookies.get(COOKIE, "")
        visitor = await self.writer.run(lambda: self._find(token))
        if self._figures is None or time.monotonic() - self._figures[0] > FRESH:
            figures = await run_in_threadpool(self._measure)
            self._figures = (time.monotonic(), figures)
        found = self._figures[1]
        own = next((one for one in found.labellers if one.name == visitor.name), None)
        table = [HEAD, *(_row(one) for one in found.labellers)] if visitor.is_owner else []
        return {"figures": figure_lines(found, None if own is None else own.left), "labellers": table}

    def _measure(self) -> LabelStats:
        with LabelStore(self.store.path) as reader:  # a connection of its own: votes do not wait for it
            return label_stats(reader)


def _as_json(route: Callable[[Request], Awaitable[dict[str, Any]]]) -> Handler:
    """The route as a handler, whose errors become messages that tell a visitor nothing about this machine."""

    async def handled(request: Request) -> Response:
        try:
            return JSONResponse(await route(request))
        except _RefusedError as error:
            return JSONResponse({"error": error.said}, error.status)
        except StoreError as error:
            print(f"lmgym: {printable(str(error))}", file=sys.stderr)
            return JSONResponse({"error": UNSAVED}, 507)
        except ClientDisconnect:
            return JSONResponse({"error": "the request ended early, or was too large"}, 413)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)

    return handled


def make_app(page: Page) -> Starlette:
    """The ASGI application."""
    return Starlette(routes=page.routes(), middleware=[Middleware(Guard)])


def page_file(name: str) -> bytes:
    """A file of the page."""
    return resources.files("agents.labelling").joinpath(name).read_bytes()


# What the page gets ---------------------------------------------------------------------------------------------------


Kind = Literal["pair", "rank", "write"]
Action = tuple[str, str, str, str | int]
"""A key, another key, the label of the button, and the choice that is sent."""
TITLES: dict[Kind, str] = {
    "pair": "Which text is better?",
    "rank": "Rank the texts, best first",
    "write": "Write a text",
}
OWN: dict[Kind, tuple[Action, ...]] = {
    "pair": (
        ("1", "a", "Left", "left"),
        ("2", "d", "Right", "right"),
        ("0", "s", "Tie", "tie"),
        ("x", "", "Both bad", "neither"),
    ),
    "rank": (("0", "s", "All equal", "tie"), ("x", "", "All bad", "neither")),
    "write": (("ctrl+Enter", "", "Send", "text"),),
}
SKIP: Action = (" ", "", "Skip", "skip")
ALWAYS: tuple[Action, ...] = (("u", "", "Undo", "undo"), ("?", "", "Help", "help"))
STRENGTHS: tuple[Action, ...] = (
    ("1", "", "Slightly better", 1),
    ("2", "", "Somewhat better", 2),
    ("3", "", "Clearly better", 3),
    ("4", "", "Much better", 4),
    (" ", "", "Cannot say", "skip"),
    *ALWAYS,
)


def kind_of(item: Item) -> Kind:
    """What is asked: to choose one of two texts, to rank more, or to write one."""
    return "write" if item.purpose == "write" else "pair" if len(item.texts) == 2 else "rank"


def actions(showing: Showing | None) -> list[Action]:
    """What a labeller can do: the keys and buttons of the page."""
    if showing is None:
        return [*ALWAYS]
    kind = kind_of(showing.item)
    texts = range(len(showing.side)) if kind == "rank" else ()
    return [*((str(i + 1), "", f"Text {i + 1}", i) for i in texts), *OWN[kind], SKIP, *ALWAYS]


def question(showing: Showing, strength: bool) -> dict[str, Any]:
    """A question for the page: texts from left to right, and nothing about who wrote them."""
    item, kind = showing.item, kind_of(showing.item)
    return {
        "nonce": showing.nonce,
        "kind": kind,
        "prompt": "" if item.messages else shown(item.prompt),
        "messages": [[message["role"], shown(message["content"])] for message in item.messages],
        "texts": [shown(item.texts[index]) for index in showing.side],
        "strengths": [*STRENGTHS] if strength and kind == "pair" else [],
        "calibration": item.purpose == "calibration",
    }


def shown(text: str) -> str:
    """The text with control characters, and those that reorder text, as ⟨U+202E⟩. Joined emoji stay whole."""
    text = text.replace("\r\n", "\n")
    return "".join(f"⟨U+{ord(c):04X}⟩" if _hides(c) else c for c in text)


def _hides(character: str) -> bool:
    return character in HIDING or (character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cs"))


def _said(outcome: Outcome) -> str:
    """What the page says after an answer; in the calibration round, whether it is the known one, and why."""
    if outcome.right is not None:
        known = "Right." if outcome.right else "The known answer is another one."
        return f"{known} {shown(outcome.item.explanation)}".strip()
    return "Saved." if outcome.is_new else "You had already answered this question: the first answer counts."


HEAD = ["labeller", "answers", "seconds each", "left", "same answer again", "right on gold", "agrees with others"]


def _row(one: Any) -> list[str]:
    seconds = "" if math.isnan(one.seconds) else f"{one.seconds:.1f}"
    return [
        shown(one.name),
        str(one.labels),
        seconds,
        *map(percent, (one.left, one.consistency, one.gold, one.agreement)),
    ]


def figure_lines(found: LabelStats, own_left: Figure | None) -> list[list[str]]:
    """The names of figures, and their values with 95 % intervals."""
    left = found.left if own_left is None else own_left
    lines = [
        ["Your answers “left”", percent(left) + (" – 50 % is expected" if left.count else "")],
        ["Same answer to a repeated question", percent(found.consistency)],
        ["Labellers agree", percent(found.agreement)],
        ["Krippendorff’s α", "–" if not found.alpha.count else str(found.alpha)],
    ]
    if found.model.count:
        ceiling = "" if math.isnan(found.ceiling) else f"; at most about {found.ceiling:.0%} with these labels"
        lines.append(["Reward model is right", percent(found.model) + ceiling])
    return lines


def percent(figure: Figure) -> str:
    """A share with its interval."""
    if not figure.count:
        return "–"
    return f"{figure.value:.0%} [{figure.low:.0%}, {figure.high:.0%}] of {figure.count}"


# What the page sends --------------------------------------------------------------------------------------------------


async def _body(request: Request) -> dict[str, Any]:
    try:
        body = parse_json((await request.body()).decode(), strict=True)
    except UnicodeDecodeError as error:
        raise ValueError("send UTF-8") from error
    if not isinstance(body, dict):
        raise ValueError("send a JSON object")
    return body


def _given(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is float and not 0 <= value < 1e9):
        raise ValueError(f"{name!r} has the wrong type or range")
    return value
