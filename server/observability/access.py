"""Follows each HTTP request: its id, its line in the log, its place in the metrics, its trace."""

import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.server import error_forms, request_id
from infuse.server.caller import SCOPE_KEY
from infuse.server.headers import RAW_SAFE
from infuse.server.observability.answered import Answered
from infuse.server.observability.metrics import HttpMetrics

log = logging.getLogger(__name__)

_QUIET = ("/metrics", "/health", "/health/live", "/health/ready")
"""Scrapes and probes come every few seconds, so only debug tells of those that succeed."""
_MOST_PATH = 200
"""How many characters of a path are logged."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_TRACE_CONTEXT = ("traceparent", "tracestate")
"""W3C Trace Context."""
_MOST_CONTEXT = 512
"""The longest `tracestate` that its specification has servers pass on."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """An HTTP request whose answer has ended. Times are by `time.perf_counter`."""

    id: str
    """Its `X-Request-Id`."""
    method: str
    path: str
    """Without the query, and quoted again: no path can write a line of its own."""
    route: str
    status: int
    started: float
    ended: float
    client: str | None
    """The address."""
    key: str | None
    """The name of its key."""
    trace_context: Mapping[str, str]
    """The headers by which its client says of which trace it is a part."""
    answered: Answered | None
    """What was generated; None where nothing was."""

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of its line in the log."""
        answered = self.answered
        named = {
            "method": self.method,
            "path": self.path,
            "route": self.route,
            "status": self.status,
            "seconds": round(self.ended - self.started, 4),
            "client": self.client,
            "key": self.key,
        }
        if answered is not None:
            named |= {
                "answer": answered.id,
                "adapter": answered.adapter,
                "prompt_tokens": answered.prompt_tokens,
                "completion_tokens": answered.completion_tokens,
                "queue_seconds": answered.queue_seconds,
                "first_token_seconds": answered.first_token_seconds,
                "finish": ",".join(answered.finish_reasons),
            }
        return {name: each for name, each in named.items() if each is not None}


@dataclass(slots=True)
class _Request:
    """What is known of a request that runs."""

    started: float
    status: int = 500
    """The answer's. Until it begins: that of a request that raises."""
    answered: Callable[[], Answered] | None = None
    """What is generated for it, to be called at its end."""


_current: ContextVar[_Request | None] = ContextVar("request", default=None)


def describe(answered: Callable[[], Answered]) -> None:
    """Have what is told of the current request tell of its answer: `answered` is called when both
    have ended."""
    current = _current.get()
    if current is not None:
        current.answered = answered


def arrived() -> float:
    """When the headers of the current request had arrived, by `time.perf_counter`."""
    current = _current.get()
    return time.perf_counter() if current is None else current.started


class Observe:
    """ASGI middleware that counts and logs each request, tells of it, and sends back its id and the
    headers that every answer has. It must be the outermost, to see every answer."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: HttpMetrics,
        routes: Routes,
        tell: Sequence[Callable[[EndedRequest], None]],
    ) -> None:
        """`tell`: what is called with each request at its end, but for scrapes and probes."""
        self._app = app
        self._metrics = metrics
        self._routes = routes
        self._tell = tell

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = _Request(started=time.perf_counter())
        id_ = request_id.id_of(Headers(scope=scope))
        # A request has a task of its own, which ends with it.
        request_id.current.set(id_)
        error_forms.current.set(error_forms.form_of(scope["path"]))
        _current.set(request)
        added = [*RAW_SAFE, (request_id.HEADER.lower().encode(), id_.encode())]

        def noting(message: Message) -> Awaitable[None]:
            """Not a coroutine: it is called for every token of a stream."""
            if message["type"] == "http.response.start":
                request.status = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            return send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                await self._app(scope, receive, noting)
            finally:
                self._end(scope, id_, request)

    def _end(self, scope: Scope, id_: str, request: _Request) -> None:
        route = self._routes.name(scope["path"])
        method = scope["method"] if scope["method"] in _METHODS else _OTHER
        ended = time.perf_counter()
        self._metrics.requests.labels(method, route, str(request.status)).inc()
        self._metrics.seconds.labels(route).observe(ended - request.started)
        is_quiet = request.status < 400 and scope["path"] in _QUIET
        caller, client = scope.get(SCOPE_KEY), scope.get("client")
        told = EndedRequest(
            id=id_,
            method=scope["method"],
            path=quote(scope["path"])[:_MOST_PATH],
            route=route,
            status=request.status,
            started=request.started,
            ended=ended,
            client=None if client is None else client[0],
            key=None if caller is None else caller.name,
            trace_context=_trace_context(Headers(scope=scope)),
            answered=None if request.answered is None else request.answered(),
        )
        level = logging.WARNING if told.status >= 500 else logging.INFO
        log.log(logging.DEBUG if is_quiet else level, "request", extra=told.fields)
        if not is_quiet:
            for tell in self._tell:
                tell(told)


def _trace_context(headers: Headers) -> dict[str, str]:
    given = {name: headers.get(name, "") for name in _TRACE_CONTEXT}
    return {name: each for name, each in given.items() if 0 < len(each) <= _MOST_CONTEXT}
