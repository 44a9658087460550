"""Follows each HTTP request: its place in the metrics."""

import re
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import HttpMetrics

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


class Observe:
    """ASGI middleware that counts each request. It must be the outermost, to see every answer."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics, routes: Routes) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(started=time.perf_counter())

        def noting(message: Message) -> Awaitable[None]:
            """Not a coroutine: it is called for every token of a stream."""
            if message["type"] == "http.response.start":
                request.status = message["status"]
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
