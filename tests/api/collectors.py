"""A small collector that speaks OTLP over HTTP, as OpenTelemetry's own does."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class Collector:
    """Keeps the spans that were sent to it, and the latest metrics."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.resource: dict[str, Any] = {}
        self.metrics: dict[str, Metric] = {}
        """By name."""
        self._spans: list[Span] = []
        self._more = threading.Condition()

    def take_metrics(self, body: bytes) -> None:
        for each in ExportMetricsServiceRequest.FromString(body).resource_metrics:
            self.resource = attributes_of(each.resource)
            scopes = each.scope_metrics
            self.metrics = {metric.name: metric for scope in scopes for metric in scope.metrics}

    def take(self, body: bytes) -> None:
        with self._more:
            for each in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resource = attributes_of(each.resource)
                for scope in each.scope_spans:
                    self._spans += scope.spans
            self._more.notify_all()

    def trace(self, request_id: str) -> list[Span]:
        """Every span of the trace that a request is in, once its own, the last, has come."""
        with self._more:
            assert self._more.wait_for(lambda: self._of(request_id), 30), "no span came"
            [own] = self._of(request_id)
            return [each for each in self._spans if each.trace_id == own.trace_id]

    def requests(self) -> list[Any]:
        """The ids of the requests that have spans so far."""
        ids = [attributes_of(each).get("infuse.request_id") for each in self._spans]
        return [each for each in ids if each is not None]

    def _of(self, request_id: str) -> list[Span]:
        named = {"infuse.request_id": request_id}
        return [each for each in self._spans if named.items() <= attributes_of(each).items()]


def attributes_of(owner: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in owner.attributes}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)


@contextmanager
def collector() -> Iterator[Collector]:
    """Within: it listens on a port of its own."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            take = found.take_metrics if self.path == "/v1/metrics" else found.take
            take(self.rfile.read(int(self.headers["Content-Length"])))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Collector(server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
