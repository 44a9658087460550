"""A proxy before an S3 server that can refuse, be full, hang, be late, or lose, repeat and reorder
requests and answers."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

KEPT = {"etag", "last-modified", "content-type"}
"""The headers of an answer."""
Fault = Literal[
    "refuses",
    "is full",
    "hangs",
    "loses the request",
    "loses the answer",
    "cuts the answer",
    "repeats the answer before",
    "does it twice",
    "does it later",
    "reorders",
]
Answer = tuple[int, bytes, dict[str, str]]
"""Status, body and headers."""
_ANOTHER_SECONDS = 0.3
"""How long a request waits for another one that may be answered before it."""


class BadS3:
    """Fine until `fault` says of a request, told by its method and path, how it goes wrong."""

    def __init__(self, behind: str, port: int) -> None:
        self.behind = urlsplit(behind).netloc
        self.endpoint = f"http://127.0.0.1:{port}"
        self.fault: Callable[[str], Fault | None] = lambda _: None
        self.requests: list[str] = []
        """The method and path of each request."""
        self.woken = threading.Event()
        """Set to end what hangs."""
        self.later: list[Callable[[], Answer]] = []
        """What is still to be done of requests that nobody waits for any more."""
        self.before: dict[str, Answer] = {}
        """Method -> the latest answer to it."""
        self.answered = threading.Event()
        """Set when a request is answered, and cleared when one begins to wait for that."""

    def do_what_is_late(self) -> None:
        late, self.later = self.later, []
        for request in late:
            request()

    def always(self, fault: Fault | None) -> None:
        self.fault = lambda _: fault


@contextmanager
def bad_s3(behind: str) -> Iterator[BadS3]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            request = f"{self.command} {self.path}"
            state.requests.append(request)
            fault = state.fault(request)
            if fault == "refuses":
                self.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            elif fault == "is full":
                self.answer(507, b"<Error><Code>XMinioStorageFull</Code></Error>")
            elif fault == "hangs":
                state.woken.wait(60)
                self.close_connection = True
            elif fault == "loses the request":
                self.close_connection = True
            elif fault == "does it later":
                state.later.append(partial(self.real_answer, body))
                self.close_connection = True
            elif fault == "repeats the answer before" and self.command in state.before:
                self.answer(*state.before[self.command])
            else:
                if fault == "reorders":
                    state.answered.clear()
                    state.answered.wait(_ANOTHER_SECONDS)
                if fault == "does it twice":
                    self.real_answer(body)
                status, data, headers = self.real_answer(body)
                state.before[self.command] = status, data, headers
                if fault == "loses the answer":
                    self.close_connection = True
                elif fault == "cuts the answer":
                    self.answer(status, data, headers, cut=len(data) // 2)
                else:
                    self.answer(status, data, headers)
                state.answered.set()

        def real_answer(self, body: bytes) -> Answer:
            real = http.client.HTTPConnection(state.behind, timeout=60)
            real.request(self.command, self.path, body, dict(self.headers))
            answer = real.getresponse()
            data = answer.read()
            real.close()
            return answer.status, data, {k: v for k, v in answer.getheaders() if k.lower() in KEPT}

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request  # noqa: N815

        def answer(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int = 0
        ) -> None:
            """`cut`: so many bytes at the end are not sent."""
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) - cut])
            self.close_connection |= cut > 0

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state = BadS3(behind, server.server_address[1])
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield state
    finally:
        state.woken.set()
        server.shutdown()
        thread.join()
        server.server_close()
