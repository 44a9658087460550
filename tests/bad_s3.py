"""A proxy before an S3 server that can refuse, be full, hang, or lose requests and answers."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

KEPT = {"etag", "last-modified", "content-type"}
"""The headers of an answer."""
Fault = Literal["refuses", "is full", "hangs", "loses the request", "loses the answer"]


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
            else:
                real = http.client.HTTPConnection(state.behind, timeout=60)
                real.request(self.command, self.path, body, dict(self.headers))
                answer = real.getresponse()
                data = answer.read()
                real.close()
                if fault == "loses the answer":
                    self.close_connection = True
                else:
                    headers = {k: v for k, v in answer.getheaders() if k.lower() in KEPT}
                    self.answer(answer.status, data, headers)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request  # noqa: N815

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

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
