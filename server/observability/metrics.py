"""The server's metrics, as Prometheus reads them."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from infuse.adapters.registry import RegistryStats
from infuse.server.engine import EngineStats
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
        self._collectors.register(_Gauges(engine, registry))
        ProcessCollector(registry=self._collectors)
        PlatformCollector(registry=self._collectors)
        Info("infuse_build", "What this server is made of.", registry=self._collectors).info(
            dict(build)
        )
        self.http = HttpMetrics(self._collectors)
        labels = ("adapter",)
        self.requests = Counter(
            "infuse_requests",
            "Finished choices, by adapter and outcome.",
            ("adapter", "outcome"),
            registry=self._collectors,
        )
        self.prompt_tokens = Counter(
            "infuse_prompt_tokens",
            "Prompt tokens of finished choices.",
            labels,
            registry=self._collectors,
        )
        self.generated_tokens = Counter(
            "infuse_generated_tokens",
            "Generated tokens of finished choices.",
            labels,
            registry=self._collectors,
        )
        self.queue = Histogram(
            "infuse_queue_seconds",
            "Time from a request's submission until it first runs; on vLLM, until vLLM gets it.",
            buckets=_SECONDS,
            registry=self._collectors,
        )
        self.first_token = Histogram(
            "infuse_time_to_first_token_seconds",
            "Time from a request's submission to its first token.",
            buckets=_SECONDS,
            registry=self._collectors,
        )
        self.per_token = Histogram(
            "infuse_time_per_output_token_seconds",
            "Mean time between a request's output tokens after the first.",
            buckets=_SECONDS,
            registry=self._collectors,
        )
        self.duration = Histogram(
            "infuse_request_seconds",
            "Time from a request's submission to its end.",
            buckets=_LONG_SECONDS,
            registry=self._collectors,
        )
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

    def families(self) -> Iterable[Metric]:
        """All values, as they are now."""
        return self._collectors.collect()

    def expose(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._collectors)


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

    def __init__(self, metrics: Metrics, label: str) -> None:
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


class _Gauges(Collector):
    def __init__(
        self, engine: Callable[[], EngineStats], registry: Callable[[], RegistryStats]
    ) -> None:
        self._engine = engine
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        engine, registry = self._engine(), self._registry()
        gauges = {
            "infuse_compiled": ("1 if the model is compiled.", int(engine.compiled)),
            "infuse_engine_alive": (
                "0 if the model has ended or hangs; only a restart helps.",
                int(engine.alive),
            ),
            "infuse_engine_ready": ("1 if new requests are taken.", int(engine.ready)),
            "infuse_requests_running": ("Sequences in the running batch.", engine.running),
            "infuse_requests_running_limit": ("Rows of the batch.", engine.most_running),
            "infuse_requests_waiting": ("Requests in the queue.", engine.waiting),
            "infuse_tokens_waiting": (
                "Prompt tokens of the requests in the queue, and up to 64 answer tokens of each.",
                engine.waiting_tokens,
            ),
            "infuse_requests_waiting_limit": ("The queue capacity.", engine.most_waiting),
            "infuse_estimated_wait_seconds": (
                "How long a new request would wait in the queue.",
                engine.wait_seconds,
            ),
            "infuse_overloaded": (
                "1 if requests are nearly refused; /health/ready is 503 then.",
                int(engine.overloaded),
            ),
            "infuse_kv_tokens_used": (
                "KV cache tokens reserved for running sequences.",
                engine.kv_tokens_used,
            ),
            "infuse_kv_tokens_cached": (
                "KV cache tokens kept for later requests; NaN where the engine does not tell.",
                math.nan if engine.kv_tokens_cached is None else engine.kv_tokens_cached,
            ),
            "infuse_kv_tokens_limit": ("Size of the KV cache in tokens.", engine.kv_tokens_total),
            "infuse_adapters_registered": ("Adapters in the store.", registry.registered),
            "infuse_adapters_damaged": (
                "Revisions whose stored files were found damaged; they are not served.",
                registry.damaged,
            ),
            "infuse_adapters_read_only": (
                "1 if the adapters' disk is read-only, as the latest change found.",
                int(registry.read_only),
            ),
            "infuse_adapters_resident": ("Adapters on the device.", registry.resident),
            "infuse_adapters_resident_limit": ("Slots of the bank.", registry.capacity),
            "infuse_adapters_pinned": ("Adapters that running sequences use.", registry.pinned),
            "infuse_adapter_leases": ("Leases that requests hold on adapters.", registry.leases),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        memory = GaugeMetricFamily(
            "infuse_memory_bytes", "Planned memory by its use.", labels=("part",)
        )
        memory.add_metric(["weights"], engine.weights_bytes)
        memory.add_metric(["kv_cache"], engine.kv_cache_bytes)
        memory.add_metric(["bank"], engine.bank_bytes)
        memory.add_metric(["saved_modules"], registry.saved_bytes)
        memory.add_metric(["unused_adapters"], registry.host_bytes)
        yield memory
        counters = {
            "infuse_adapter_swaps": ("Adapters loaded into a slot.", registry.swaps),
            "infuse_preemptions": (
                "Sequences preempted, to be computed again.",
                engine.preemptions,
            ),
            "infuse_steps": ("Forward passes of the model.", engine.steps),
            "infuse_step_retries": (
                "Forward passes that failed and ran again in parts.",
                engine.step_retries,
            ),
            "infuse_drafted_tokens": ("Draft tokens verified.", engine.drafted_tokens),
            "infuse_accepted_tokens": ("Draft tokens accepted.", engine.accepted_tokens),
            "infuse_prefix_cache_query_tokens": (
                "Prompt tokens looked up in the prefix cache.",
                engine.prefix_queried_tokens,
            ),
            "infuse_prefix_cache_hit_tokens": (
                "Prompt tokens found in the prefix cache.",
                engine.prefix_hit_tokens,
            ),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
        yield from _read_by_gateways(engine, registry)


def _read_by_gateways(engine: EngineStats, registry: RegistryStats) -> Iterator[Metric]:
    """The gauges that inference gateways choose a server by, under vLLM's names: see Kubernetes'
    gateway-api-inference-extension, proposal 003, "Model Server Protocol"."""
    gauges = {
        "vllm:num_requests_running": ("As infuse_requests_running.", engine.running),
        "vllm:num_requests_waiting": ("As infuse_requests_waiting.", engine.waiting),
        "vllm:kv_cache_usage_perc": (
            "Share of the KV cache that running sequences reserve, from 0 to 1.",
            engine.kv_tokens_used / engine.kv_tokens_total,
        ),
    }
    for name, (text, value) in gauges.items():
        yield GaugeMetricFamily(name, text, value=value)
    adapters = {
        "max_lora": str(registry.capacity),
        "running_lora_adapters": ",".join(sorted(engine.running_adapters)),
        "waiting_lora_adapters": ",".join(sorted(engine.waiting_adapters)),
    }
    yield _labelled(
        "vllm:lora_requests_info",
        "Adapters that run and wait, as requests name them; the value is the time of the scrape.",
        adapters,
        time.time(),
    )
    if engine.kv_block_tokens is not None:
        blocks = {
            "block_size": str(engine.kv_block_tokens),
            "num_gpu_blocks": str(engine.kv_tokens_total // engine.kv_block_tokens),
        }
        text = "Tokens of a block of the prefix cache, and blocks of the KV cache."
        yield _labelled("vllm:cache_config_info", text, blocks, 1)


def _labelled(name: str, text: str, labels: dict[str, str], value: float) -> Metric:
    """A gauge with one series."""
    family = GaugeMetricFamily(name, text, labels=tuple(labels))
    family.add_metric(tuple(labels.values()), value)
    return family
