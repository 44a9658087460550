"""Metrics over OTLP at a real collector: the names and values of /metrics."""

import logging
import sys
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import httpx
import pytest
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality
from prometheus_client.parser import text_string_to_metric_families

from infuse.server.observability.otlp import open_metrics
from tests.api.collectors import Collector, attributes_of, collector
from tests.api.conftest import RunningServer, ServeAdapters
from tests.api.test_adapters import complete
from tests.api.test_streaming import eventually
from tests.api.test_traces import point_to

MOVING = ("process_", "infuse_http_", "infuse_memory_bytes", "vllm:lora_requests_info")
"""What changes by itself, or by the scrape."""

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def collected() -> Iterator[Collector]:
    with collector() as collected:
        yield collected


@pytest.fixture(scope="module")
def server(collected: Collector, serve_adapters: ServeAdapters) -> Iterator[RunningServer]:
    with pytest.MonkeyPatch.context() as patch:
        point_to(patch, collected.url)
        patch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
        with serve_adapters() as server:
            yield server


def scraped(client: httpx.Client) -> Values:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def sent(collected: Collector) -> Values:
    values: Values = {}
    for metric in collected.metrics.values():
        kind = metric.WhichOneof("data")
        for point in getattr(metric, kind).data_points:
            labels = frozenset(attributes_of(point).items())
            if kind != "histogram":
                values[metric.name, labels] = point.as_double
                continue
            values[f"{metric.name}_count", labels] = point.count
            values[f"{metric.name}_sum", labels] = point.sum
            bounds = [*map(str, point.explicit_bounds), "+Inf"]
            for bound, count in zip(bounds, accumulate(point.bucket_counts), strict=True):
                values[f"{metric.name}_bucket", labels | {("le", bound)}] = count
    return values


def still(values: Values) -> Values:
    """Those that stay as they are while no request runs, and are numbers."""
    return {
        key: value
        for key, value in values.items()
        if not key[0].startswith(MOVING) and value == value
    }


def test_what_is_sent_has_the_names_labels_and_values_of_metrics(
    client: httpx.Client, collected: Collector
) -> None:
    for model in ("mlp", "queries", "tiny", "mlp"):
        assert complete(client, model).status_code == 200
    client.get("/v1/adapters/nobody")
    # The first scrape makes series of its own.
    client.get("/metrics")

    assert eventually(lambda: sent(collected).keys() == scraped(client).keys(), 30)
    assert eventually(lambda: still(sent(collected)) == still(scraped(client)), 30)
    values = still(sent(collected))
    mlp = {"adapter": "mlp", "outcome": "length"}
    assert values["infuse_requests_total", frozenset(mlp.items())] >= 2
    assert values["infuse_request_seconds_count", frozenset()] >= 4
    assert values["infuse_adapters_registered", frozenset()] == 3


def test_what_is_sent_has_the_kind_of_what_it_is(
    client: httpx.Client, collected: Collector
) -> None:
    complete(client, "mlp")

    def metric(name: str) -> Any:
        assert eventually(lambda: name in collected.metrics, 30)
        return collected.metrics[name]

    counter, histogram = metric("infuse_requests_total"), metric("infuse_request_seconds")
    for data in (counter.sum, histogram.histogram):
        since_start = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
        assert data.aggregation_temporality == since_start
        for point in data.data_points:
            assert 0 < point.start_time_unix_nano < point.time_unix_nano
    assert counter.sum.is_monotonic
    assert counter.description == "Finished choices, by adapter and outcome."
    assert metric("infuse_requests_running").WhichOneof("data") == "gauge"
    assert metric("infuse_build_info").gauge.data_points[0].as_double == 1
    assert collected.resource["service.name"] == "infuse"


def test_where_no_collector_is_named_no_metrics_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "infuse.server.observability.sent_metrics", raising=False)
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)

    assert open_metrics(list, "1") is None
    assert "infuse.server.observability.sent_metrics" not in sys.modules


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OTEL_METRICS_EXPORTER": "none"}, ""),
        ({"OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc"}, "No metrics are sent by grpc"),
        ({}, "pip install 'infuse-server[otlp]'"),
    ],
)
def test_metrics_that_are_off_or_cannot_be_sent_keep_no_server_from_starting(
    variables: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter: Any = "opentelemetry.exporter.otlp.proto.http.metric_exporter"
    monkeypatch.setitem(sys.modules, exporter, None)
    monkeypatch.delitem(sys.modules, "infuse.server.observability.sent_metrics", raising=False)
    point_to(monkeypatch, "http://127.0.0.1:9")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with caplog.at_level(logging.WARNING, "infuse.server.observability.otlp"):
        assert open_metrics(list, "1") is None

    assert said in caplog.text
    assert bool(caplog.records) == bool(said)
