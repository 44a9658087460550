"""Metrics over OTLP: OpenTelemetry's exporter sends periodically what `/metrics` shows.

Names, labels and values are Prometheus'. OpenTelemetry's own environment variables say where they
go, and how often. Its SDK has no bridge from prometheus_client, so their values are put into its.
"""

import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import Metric as Family
from prometheus_client.samples import Sample

from infuse.server.observability.resource import own_resource

log = logging.getLogger(__name__)

_INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
_FLUSH_SECONDS = 3.0
"""Seconds that the last values have, at the server's end, to reach the collector."""
_SINCE_START = AggregationTemporality.CUMULATIVE

_Labels = tuple[tuple[str, str], ...]


class SentMetrics:
    """Sends all metrics, from a thread of its own. What the collector does not take is not sent
    again: the next values are newer."""

    def __init__(self, families: Callable[[], Iterable[Family]], version: str) -> None:
        """`families`: reads all metrics."""
        self._families = families
        self._resource = own_resource(version)
        self._scope = InstrumentationScope("infuse", version)
        self._exporter = OTLPMetricExporter()
        self._started = time.time_ns()
        self._seconds = float(os.environ.get(_INTERVAL) or 60_000) / 1000
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sent-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send the last values, as far as the collector takes them in a few seconds."""
        self._closing.set()
        self._thread.join(_FLUSH_SECONDS)

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            self._send()
        self._send()

    def _send(self) -> None:
        try:
            now = time.time_ns()
            families = [each for each in self._families() if each.samples]
            metrics = [_metric(each, self._started, now) for each in families]
            scope = ScopeMetrics(self._scope, metrics, schema_url="")
            resource = ResourceMetrics(self._resource, [scope], schema_url="")
            self._exporter.export(MetricsData([resource]))
        except Exception as error:
            # What sees the server goes on where one value cannot be read.
            log.warning("The metrics were not sent: %s", error)


def _metric(family: Family, started: int, now: int) -> Metric:
    """`started`: from when the values count, where they do not say so; `now`: both in Unix
    nanoseconds."""
    created = [each for each in family.samples if each.name.endswith("_created")]
    begun = {_labels(each): round(each.value * 1e9) for each in created}
    values = [each for each in family.samples if each not in created]
    if family.type == "histogram":
        points = [
            _distribution(labels, samples, begun.get(labels, started), now)
            for labels, samples in _by_labels(values).items()
        ]
        histogram = Histogram(points, _SINCE_START)
        return Metric(family.name, family.documentation, "", histogram)
    numbers = [
        NumberDataPoint(each.labels, begun.get(_labels(each), started), now, float(each.value))
        for each in values
    ]
    is_counter = family.type == "counter"
    data = Sum(numbers, _SINCE_START, is_monotonic=True) if is_counter else Gauge(numbers)
    return Metric(values[0].name, family.documentation, "", data)


def _labels(sample: Sample) -> _Labels:
    """The labels of a series: all but the bound of a bucket."""
    return tuple((name, value) for name, value in sample.labels.items() if name != "le")


def _by_labels(samples: Iterable[Sample]) -> dict[_Labels, list[Sample]]:
    found = defaultdict(list)
    for each in samples:
        found[_labels(each)].append(each)
    return found


def _distribution(
    labels: _Labels, samples: Sequence[Sample], started: int, now: int
) -> HistogramDataPoint:
    """Prometheus' buckets count all values up to their bound, OpenTelemetry's those above the bound
    before."""
    buckets = {each.labels["le"]: each.value for each in samples if "le" in each.labels}
    total, count = (
        next(each.value for each in samples if each.name.endswith(end))
        for end in ("_sum", "_count")
    )
    return HistogramDataPoint(
        dict(labels),
        started,
        now,
        int(count),
        total,
        [int(upper - lower) for lower, upper in pairwise([0, *buckets.values()])],
        [float(bound) for bound in buckets if bound != "+Inf"],
        # Nobody has kept the smallest and the largest value.
        min=None,  # type: ignore[arg-type]
        max=None,  # type: ignore[arg-type]
    )
