"""The server's metrics, as Prometheus reads them."""

import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import Metric

from infuse.adapters.registry import RegistryStats
from infuse.server.engine import EngineStats
from infuse.server.observability.gauges import Gauges
from infuse.server.version import own_version

_MAX_ADAPTER_LABELS = 100
"""How many adapters have series of their own: the first that requests name. The others are counted
as "other"."""
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_LONG_SECONDS = (*_SECONDS, 120.0, 300.0)


def build_info(engine: str) -> dict[str, str]:
    """The labels of `infuse_build_info`; `engine` is the setting."""
    return {"version": own_version(), "engine": engine, "torch": version("torch")}


class Metrics:
    """Counters and histograms of requests; gauges are read from their owners at each scrape."""

    def __init__(
        self,
        engine: Callable[[], EngineStats],
        registry: Callable[[], RegistryStats],
        build: Mapping[str, str],
    ) -> None:
        """`build`: see `build_info`."""
        self._collectors = CollectorRegistry()
        self._collectors.register(Gauges(engine, registry))
        ProcessCollector(registry=self._collectors)
        PlatformCollector(registry=self._collectors)
        Info("infuse_build", "What this server is made of.", registry=self._collectors).info(
            dict(build)
        )
        self.http = HttpMetrics(self._collectors)
        self.generation = GenerationMetrics(self._collectors)
        self.keys_file_broken = Gauge(
            "infuse_keys_file_broken",
            "1 if the keys file has changed and cannot be used, so the keys before are.",
            registry=self._collectors,
        )
        self.issuer_unreachable = Gauge(
            "infuse_oidc_issuer_unreachable",
            "1 if the OIDC issuer does not tell its keys, so those before are used.",
            registry=self._collectors,
        )
        self.unwritten_usage = Gauge(
            "infuse_usage_requests_unwritten",
            "Requests whose usage is not written yet. Above 0 for long: it cannot be written.",
            registry=self._collectors,
        )

    def families(self) -> Iterable[Metric]:
        """All values, as they are now."""
        return self._collectors.collect()

    def expose(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._collectors)


class GenerationMetrics:
    """Counts and times of requests to the model."""

    def __init__(self, collectors: CollectorRegistry) -> None:
        self.requests = Counter(
            "infuse_requests",
            "Finished choices, by adapter and outcome.",
            ("adapter", "outcome"),
            registry=collectors,
        )
        self.prompt_tokens = Counter(
            "infuse_prompt_tokens",
            "Prompt tokens of finished choices.",
            ("adapter",),
            registry=collectors,
        )
        self.generated_tokens = Counter(
            "infuse_generated_tokens",
            "Generated tokens of finished choices.",
            ("adapter",),
            registry=collectors,
        )
        self.queue = Histogram(
            "infuse_queue_seconds",
            "Time from a request's submission until it first runs; on vLLM, until vLLM gets it.",
            buckets=_SECONDS,
            registry=collectors,
        )
        self.first_token = Histogram(
            "infuse_time_to_first_token_seconds",
            "Time from a request's submission to its first token.",
            buckets=_SECONDS,
            registry=collectors,
        )
        self.per_token = Histogram(
            "infuse_time_per_output_token_seconds",
            "Mean time between a request's output tokens after the first.",
            buckets=_SECONDS,
            registry=collectors,
        )
        self.duration = Histogram(
            "infuse_request_seconds",
            "Time from a request's submission to its end.",
            buckets=_LONG_SECONDS,
            registry=collectors,
        )
        self._labels: set[str] = set()

    @staticmethod
    def label_of(base: str, adapter: str | None) -> str:
        """The adapter label of a request; `adapter` is its lease's label, None for the base."""
        if adapter is None:
            return base
        return "mixture" if "(" in adapter else adapter.partition("@")[0]

    def request_started(self, adapter: str) -> "RequestMetrics":
        """`adapter`: see `label_of`."""
        if len(self._labels) < _MAX_ADAPTER_LABELS:
            self._labels.add(adapter)
        return RequestMetrics(self, adapter if adapter in self._labels else "other")


class HttpMetrics:
    """Counts and times of HTTP requests and connections."""

    def __init__(self, collectors: CollectorRegistry) -> None:
        self.requests = Counter(
            "infuse_http_requests",
            "Answered HTTP requests, by method, route and status.",
            ("method", "route", "status"),
            registry=collectors,
        )
        self.seconds = Histogram(
            "infuse_http_request_seconds",
            "Time from an HTTP request's head to the end of its answer.",
            ("route",),
            buckets=_LONG_SECONDS,
            registry=collectors,
        )
        self.in_flight = Gauge(
            "infuse_http_requests_in_flight",
            "HTTP requests that are not answered yet.",
            registry=collectors,
        )
        self.connections = Gauge(
            "infuse_http_connections", "Open connections.", registry=collectors
        )
        self.most_connections = Gauge(
            "infuse_http_connections_limit", "The most open connections.", registry=collectors
        )
        self.refused_connections = Counter(
            "infuse_http_connections_refused",
            "Connections that were closed with an error before a route was asked, by its code.",
            ("code",),
            registry=collectors,
        )


class RequestMetrics:
    """Measures the times of one request."""

    def __init__(self, metrics: GenerationMetrics, label: str) -> None:
        self._metrics = metrics
        self._label = label
        self._started = time.perf_counter()
        self.first_token: float | None = None
        """When the first token came, by `time.perf_counter`."""
        self._last = self._started

    def started(self, at: float) -> None:
        """Note when the request first ran, by `time.perf_counter`."""
        self._metrics.queue.observe(at - self._started)

    def token(self, count: int) -> None:
        """Note that `count` tokens have come now."""
        if count == 0:
            return
        self._last = time.perf_counter()
        if self.first_token is None:
            self.first_token = self._last
            self._metrics.first_token.observe(self.first_token - self._started)

    def finished(self, outcome: str, prompt_tokens: int, completion_tokens: int) -> None:
        """`outcome`: stop, length, cancelled, constraint, timeout or error."""
        metrics = self._metrics
        metrics.requests.labels(self._label, outcome).inc()
        metrics.prompt_tokens.labels(self._label).inc(prompt_tokens)
        metrics.generated_tokens.labels(self._label).inc(completion_tokens)
        metrics.duration.observe(time.perf_counter() - self._started)
        if self.first_token is not None and completion_tokens > 1:
            decoding = self._last - self.first_token
            metrics.per_token.observe(decoding / (completion_tokens - 1))
