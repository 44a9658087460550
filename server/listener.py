"""The HTTP server: uvicorn, with bounds on connections and time, and a drain that answers every
request."""

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from starlette.datastructures import State
from starlette.types import ASGIApp

from infuse.server.errors import ApiError, error_body
from infuse.server.headers import SAFE
from infuse.server.lingering import LingeringTransport
from infuse.server.observability.metrics import HttpMetrics
from infuse.server.services import Services
from infuse.server.settings import Settings

log = logging.getLogger(__name__)

MAX_HEAD_BYTES = 64 << 10
"""The most that a request's line and headers may take."""
_BACKLOG = 2048
"""Connections that the system holds until they are accepted: uvicorn's default."""
ANSWERING_SECONDS = 5.0
"""Seconds that requests have, after the drain, to answer that they were ended."""
ENDING_SECONDS = 30.0
"""Seconds that the application has to end, after all that, where its model has failed."""
WRITING_SECONDS = 1.0
"""Seconds that clients have, after that, to read the answer."""


def freeze_heap() -> None:
    """Exempt all objects that exist now from garbage collection. A collection that looks through
    the million that a start makes takes 0.3 s, in which nothing is answered."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True, slots=True)
class Limits:
    connections: int
    receive_seconds: float
    """How long a request's head may take."""
    send_seconds: float
    """How long a client may leave its answer unread."""
    discarded_bytes: int
    """How much is read and thrown away of a request that is answered already. It has
    `receive_seconds` for it."""


class Connection(asyncio.Protocol):
    """Adds to uvicorn's protocols deadlines, a bound on the head, and errors of our shape.

    Mixed into the protocol that uvicorn chose. A running request pays nothing for it: the server
    calls `check` once a second, which finds the connections that are late.
    """

    limits: Limits
    metrics: HttpMetrics
    transport: LingeringTransport
    connections: set["Connection"]
    cycle: Any
    """uvicorn's: the newest request, None before the first."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.idle_since = time.monotonic()
        """When the connection became idle; only read while it is."""
        self._has_begun = False
        """Whether a part of the next request has come."""
        self._in_head = False
        self._head_bytes = 0
        self._heads = 0
        """How many heads have begun in the data that came last."""
        self._in_body = False
        self._discarded_bytes = 0
        """How much of an answered request has come since its answer."""
        self._unread_since: float | None = None
        super().connection_made(LingeringTransport(transport, lambda: self._is_discarding))
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def _make_room(self) -> None:
        """Close the connections that linger, or else the one that has been idle longest; where none
        is idle, refuse this one."""
        lingering = [each for each in self.connections if each.transport.lingers]
        for each in lingering:
            each.transport.abort()
        if len(self.connections) - len(lingering) <= self.limits.connections:
            return
        others = [each for each in self.connections if each.is_idle and each is not self]
        others = [each for each in others if not each.transport.is_closing()]
        if others:
            min(others, key=lambda each: each.idle_since).transport.abort()
            return
        message = f"All {self.limits.connections} connections of this server are in use."
        headers = {"Retry-After": "1"}
        self._refuse(ApiError(503, message, code="too_many_connections", headers=headers))

    @property
    def is_idle(self) -> bool:
        """Whether no request runs on the connection."""
        return self.cycle is None or bool(self.cycle.response_complete)

    @property
    def _is_discarding(self) -> bool:
        """Whether what comes belongs to a request that is answered already."""
        return self.transport.lingers or (self._in_body and self.is_idle)

    def data_received(self, data: bytes) -> None:
        if self._is_discarding:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > self.limits.discarded_bytes:
                self.transport.abort()
        if self.transport.is_closing():
            return
        begins = 0 if self._in_head or self._in_body else 1
        self._has_begun, self._heads = True, 0
        super().data_received(data)
        if self.transport.is_closing():
            return
        # With more heads in it than that, a part of the data was another request's.
        if self._in_head and self._heads == begins:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                message = f"The request's headers are larger than {MAX_HEAD_BYTES} bytes."
                self._refuse(ApiError(431, message, code="headers_too_large"))

    def on_message_begin(self) -> None:
        """httptools reads a head of any size; h11 has a bound of its own, and never calls this."""
        super().on_message_begin()  # type: ignore[misc]
        self._in_head, self._head_bytes = True, 0
        self._heads += 1

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        super().on_headers_complete()  # type: ignore[misc]

    def on_message_complete(self) -> None:
        self._in_body, self._discarded_bytes = False, 0
        super().on_message_complete()  # type: ignore[misc]

    def on_response_complete(self) -> None:
        self.idle_since = time.monotonic()
        self._has_begun = False
        super().on_response_complete()  # type: ignore[misc]

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()

    def send_400_response(self, _: str) -> None:
        """Answer what is no HTTP request. The name is uvicorn's."""
        self._refuse(ApiError(400, "What was sent is no HTTP request.", code="invalid_request"))

    def check(self, now: float) -> None:
        """End the connection where its client is too slow; what runs for it is cancelled then."""
        is_late = now - self.idle_since > self.limits.receive_seconds
        if self._is_discarding:
            if is_late:
                self.transport.abort()
            return
        if self.transport.is_closing() and self._unread_since is None:
            self._unread_since = now
        if self._unread_since is not None:
            if now - self._unread_since > self.limits.send_seconds:
                self.transport.abort()
        elif self.is_idle and is_late:
            message = f"No request came within {self.limits.receive_seconds:g} s."
            self._refuse(ApiError(408, message, code="request_timeout"), self._has_begun)

    def _refuse(self, error: ApiError, answered: bool = True) -> None:
        """Close, and say why, unless another answer is under way."""
        if answered and self.is_idle:
            self.metrics.refused_connections.labels(error.code).inc()
            body = error_body(error).encode()
            head = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
            head += [f"{name}: {value}" for name, value in (SAFE | error.headers).items()]
            head += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
            head += ["Connection: close", "", ""]
            self.transport.write("\r\n".join(head).encode() + body)
            self.idle_since = time.monotonic()
            self.transport.linger()
        self.transport.close()

    def shutdown(self) -> None:
        """The server stops: it does not wait for the rest of what it has answered."""
        if self._is_discarding:
            self.transport.abort()
        else:
            super().shutdown()  # type: ignore[misc]


class Server(uvicorn.Server):
    """Serves an application of `create_app`'s."""

    def __init__(self, app: ASGIApp, settings: Settings, state: State) -> None:
        """`state`: the application's, which has its services."""
        config = uvicorn.Config(
            app,
            # What logs is set up once for all; `Observe` logs requests.
            log_config=None,
            log_level=settings.log_level,
            access_log=False,
            backlog=_BACKLOG,
            ws="none",
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            ssl_certfile=settings.ssl_certfile,
            ssl_keyfile=settings.ssl_keyfile,
            ssl_keyfile_password=settings.ssl_keyfile_password,
            ssl_ca_certs=settings.ssl_ca_certs,
            ssl_cert_reqs=ssl.CERT_NONE if settings.ssl_ca_certs is None else ssl.CERT_REQUIRED,
        )
        config.load()
        limits = Limits(
            settings.max_connections,
            settings.receive_timeout,
            settings.send_timeout,
            2 * max(settings.form_bytes, settings.max_body_bytes),
        )
        services: Services = state.services
        self._metrics = services.metrics.http
        self._metrics.most_connections.set(limits.connections)
        bases = (Connection, config.http_protocol_class)
        attributes = {"limits": limits, "metrics": self._metrics}
        config.http_protocol_class = type("Connection", bases, attributes)
        super().__init__(config)
        self._state = state
        self._drain_timeout = settings.drain_timeout
        self.has_failed = False
        """Whether the server ends because its model has ended or hangs."""
        patience = settings.drain_timeout + ANSWERING_SECONDS + ENDING_SECONDS
        self._last_resort = threading.Timer(patience, os._exit, (1,))
        self._last_resort.daemon = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        for listening, what in zip(sockets, ("Infuse", "Administration"), strict=False):
            url = self._url(listening.getsockname())
            log.info("%s answers on %s (/docs says what it can do).", what, url)

    def _url(self, address: Any) -> str:
        """The URL of a socket's address: of a unix socket a path, of others host and port."""
        scheme = "http" if self.config.ssl is None else "https"
        if isinstance(address, str):
            return f"{scheme}+unix://{address}"
        host, port = address[:2]
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:
            now = time.monotonic()
            self._metrics.connections.set(len(self._connections))
            for connection in self._connections:
                connection.check(now)
            self._watch_engine()
        return await super().on_tick(counter)

    def _watch_engine(self) -> None:
        """End the server where its model has ended: whoever supervises it starts it again."""
        services: Services = self._state.services
        if not self.should_exit and not services.engine.stats().alive:
            log.critical("The model has ended, and so does the server, with status 1.")
            self.has_failed = self.should_exit = True
            # What hangs may hold what the end waits for.
            self._last_resort.start()

    def handle_exit(self, sig: int, _: FrameType | None) -> None:
        """The first signal begins the drain, after which the process ends with 0; the second ends
        it at once, with the status that shells give a signal."""
        if self.should_exit:
            # Not by the signal itself: the first process of a container would survive it.
            os._exit(128 + signal.Signals(sig))
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners, let requests end, and the application after them."""
        draining = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        await draining
        self._last_resort.cancel()

    async def _drain(self) -> None:
        """Let requests finish within the drain's time. After it, end those in the engine with an
        error, which is a stream's last event; then cancel the others; then close connections whose
        clients do not read."""
        if await self._are_done(self._drain_timeout):
            return
        count = len(self.server_state.tasks)
        log.warning("The drain's time is over; %d requests are answered 503.", count)
        services: Services = self._state.services
        # Requests that hang may hold all threads of the default limiter.
        own = CapacityLimiter(1)
        stopping = asyncio.create_task(to_thread.run_sync(services.engine.stop, 0.0, limiter=own))
        if not await self._are_done(ANSWERING_SECONDS):
            for task in self.server_state.tasks:
                task.cancel()
            if not await self._are_done(WRITING_SECONDS):
                for connection in self._connections:
                    connection.transport.abort()
        await stopping

    async def _are_done(self, seconds: float) -> bool:
        """Whether, within so many seconds, all requests end and their answers are read."""
        until = time.monotonic() + seconds
        while self.server_state.tasks or self.server_state.connections:
            if time.monotonic() >= until:
                return False
            await asyncio.sleep(0.05)
        return True

    @property
    def _connections(self) -> list[Connection]:
        return list(self.server_state.connections)  # type: ignore[arg-type]
