"""Follows each HTTP request: its id, its line in the log, its place in the metrics."""

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import request_id
from server.caller import SCOPE_KEY
from server.metrics import HttpMetrics

log = logging.getLogger(__name__)

Fields = Callable[[], Mapping[str, object]]
_QUIET = ("/metrics", "/health/live", "/health/ready")
"""Scrapes and probes come every few seconds, so only those that fail are logged."""
_MOST_PATH = 200
"""How many characters of a path are logged."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OTHER = "other"
"""The label of a path that is no route's, and of a method that HTTP does not have."""


class Routes:
    """Names the route of a path, so that a label has no more values than there are routes.

    The router names only the routes of requests that it gets, and it does not get what is refused.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        """`paths`: as the OpenAPI document writes them."""
        # The paths with the most text of their own come first.
        ordered = sorted(paths, key=lambda path: -len(re.sub(r"\{.*?\}", "", path)))
        self._patterns = [
            (re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(path))), path) for path in ordered
        ]

    def name(self, path: str) -> str:
        return next((name for pattern, name in self._patterns if pattern.fullmatch(path)), _OTHER)


@dataclass(slots=True)
class _Request:
    """What is known of a request that runs."""

    started: float
    status: int = 500
    """The answer's. Until it begins: that of a request that raises."""
    fields: Fields = dict
    """What its line in the log says besides, as it is in the end."""


_current: ContextVar[_Request | None] = ContextVar("request", default=None)


def describe(fields: Fields) -> None:
    """Have the log's line of the current request say more: `fields` is called at its end."""
    current = _current.get()
    if current is not None:
        current.fields = fields


class Observe:
    """ASGI middleware that counts and logs each request, and sends back its id. It must be the
    outermost, to see every answer."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, routes: Routes) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(started=time.perf_counter())
        id_ = request_id.id_of(Headers(scope=scope))
        # A request has a task of its own, which ends with it.
        request_id.current.set(id_)
        _current.set(request)
        header = (request_id.HEADER.lower().encode(), id_.encode())

        def noting(message: Message) -> Awaitable[None]:
            """Not a coroutine: it is called for every token of a stream."""
            if message["type"] == "http.response.start":
                request.status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            return send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, noting)
            finally:
                self._end(scope, request)

    def _end(self, scope: Scope, request: _Request) -> None:
        route = self._routes.name(scope["path"])
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        seconds = time.perf_counter() - request.started
        self._metrics.requests.labels(method, route, str(request.status)).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        if request.status >= 400 or scope["path"] not in _QUIET:
            level = logging.WARNING if request.status >= 500 else logging.INFO
            fields = _line(scope, route, request, seconds)
            log.log(level, "request", extra={k: v for k, v in fields.items() if v is not None})


def _line(scope: Scope, route: str, request: _Request, seconds: float) -> dict[str, Any]:
    caller = scope.get(SCOPE_KEY)
    client = scope.get("client")
    return {
        "method": scope["method"],
        # Without the query. Quoted again: no path can write a line of its own.
        "path": quote(scope["path"])[:_MOST_PATH],
        "route": route,
        "status": request.status,
        "seconds": round(seconds, 4),
        "client": None if client is None else client[0],
        "key": None if caller is None else caller.name,
        **request.fields(),
    }
