"""Traces of requests, which OpenTelemetry's exporter sends over OTLP.

The spans of a request are made once it has ended, from the times that are known then, by
OpenTelemetry's semantic conventions for HTTP servers and for generative AI. OpenTelemetry's own
environment variables say where they go and which are sampled.
"""

import threading
import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from infuse.server.engine.request import FinishReason
from infuse.server.observability.access import EndedRequest
from infuse.server.observability.answered import Answered
from infuse.server.observability.resource import own_resource

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/messages": "chat",
    "/api/chat": "chat",
    "/api/generate": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
    "/v1/rank": "rank",
}
"""Route -> `gen_ai.operation.name`. The conventions have none for ranking."""
_FAILED = (
    FinishReason.ERROR,
    FinishReason.ENGINE_DEAD,
    FinishReason.CONSTRAINT,
    FinishReason.TIMEOUT,
)
_MOST_CHOICES = 16
"""How many choices of an answer have spans. An answer may have hundreds."""
_FLUSH_SECONDS = 3.0
"""Seconds that the last spans have, at the server's end, to reach the collector."""

_Attributes = dict[str, str | int | float | list[str]]


class Traces:
    """Sends the trace of each request, from a thread of OpenTelemetry's. Where the collector does
    not take them, spans are dropped."""

    def __init__(self, version: str) -> None:
        self._provider = TracerProvider(resource=own_resource(version), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("infuse", version)
        self._traceparent = TraceContextTextMapPropagator()

    def tell(self, request: EndedRequest) -> None:
        """Make the spans of a request that has ended."""
        clock = _Clock()
        span = self._tracer.start_span(
            f"{request.method} {request.route}",
            self._traceparent.extract(request.trace_context),
            SpanKind.SERVER,
            _of_request(request),
            start_time=clock.at(request.started),
        )
        if request.status >= 500:
            span.set_attribute("error.type", str(request.status))
            span.set_status(Status(StatusCode.ERROR))
        if span.is_recording() and request.answered is not None:
            self._tell_answer(request, request.answered, set_span_in_context(span), clock)
        span.end(clock.at(request.ended))

    def _tell_answer(
        self, request: EndedRequest, answered: Answered, parent: Context, clock: "_Clock"
    ) -> None:
        self._span("prepare", parent, clock, request.started, answered.submitted)
        operation = _OPERATIONS.get(request.route, request.route)
        span = self._tracer.start_span(
            f"{operation} {answered.model}",
            parent,
            attributes=_of_answer(operation, answered),
            start_time=clock.at(answered.submitted),
        )
        failed = [each.finish for each in answered.choices if each.finish in _FAILED]
        if failed:
            span.set_attribute("error.type", failed[0].value)
            span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        for choice in answered.choices[:_MOST_CHOICES]:
            for stage in choice.stages(answered.submitted):
                attributes: _Attributes = {"infuse.choice": choice.number}
                self._span(stage.name, inside, clock, stage.begin, stage.end, attributes)
        span.end(clock.at(answered.ended))
        self._span("send", parent, clock, answered.ended, request.ended)

    def _span(
        self,
        name: str,
        parent: Context,
        clock: "_Clock",
        begin: float,
        end: float,
        attributes: _Attributes | None = None,
    ) -> None:
        span: Span = self._tracer.start_span(
            name, parent, attributes=attributes, start_time=clock.at(begin)
        )
        span.end(clock.at(end))

    def close(self) -> None:
        """Send what is left, as far as the collector takes it in a few seconds."""
        # OpenTelemetry waits for half a minute where the collector hangs.
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_FLUSH_SECONDS)


class _Clock:
    """Turns times by `time.perf_counter` into Unix times in nanoseconds, all by the same offset."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.perf_counter_ns()

    def at(self, seconds: float) -> int:
        return self._offset + round(seconds * 1e9)


def _of_request(request: EndedRequest) -> _Attributes:
    known: Mapping[str, str | int | None] = {
        "http.request.method": request.method,
        "http.route": request.route,
        "http.response.status_code": request.status,
        "url.path": request.path,
        "url.scheme": "http",
        "client.address": request.client,
        "infuse.request_id": request.id,
        "infuse.key": request.key,
    }
    return {name: each for name, each in known.items() if each is not None}


def _of_answer(operation: str, answered: Answered) -> _Attributes:
    attributes: _Attributes = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "infuse",
        "gen_ai.request.model": answered.model,
        "gen_ai.request.choice.count": len(answered.choices),
        "gen_ai.response.id": answered.id,
        "gen_ai.response.model": answered.fingerprint,
        "gen_ai.response.finish_reasons": answered.finish_reasons,
        "gen_ai.usage.input_tokens": answered.prompt_tokens,
        "gen_ai.usage.cache_read.input_tokens": answered.cached_tokens,
        "gen_ai.usage.output_tokens": answered.completion_tokens,
    }
    if answered.adapter is not None:
        name, _, revision = answered.adapter.partition("@")
        is_one = revision.isdecimal()
        attributes["infuse.adapter.name"] = name if is_one else answered.adapter
        if is_one:
            attributes["infuse.adapter.revision"] = int(revision)
    return attributes
