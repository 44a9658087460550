"""The metrics that are read from their owners at each scrape."""

import math
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from infuse.adapters.registry import RegistryStats
from infuse.server.engine import EngineStats

_Values = Mapping[str, tuple[str, float]]
"""Name of a metric -> its help text and value."""


class Gauges(Collector):
    """Reads the engine and the registry."""

    def __init__(
        self, engine: Callable[[], EngineStats], registry: Callable[[], RegistryStats]
    ) -> None:
        self._engine = engine
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        engine, registry = self._engine(), self._registry()
        yield from _gauges(_of_engine(engine))
        yield from _gauges(_of_registry(registry))
        yield _memory(engine, registry)
        for name, (text, value) in _counted(engine, registry).items():
            yield CounterMetricFamily(name, text, value=value)
        yield from _read_by_gateways(engine, registry)


def _gauges(values: _Values) -> Iterator[Metric]:
    for name, (text, value) in values.items():
        yield GaugeMetricFamily(name, text, value=value)


def _of_engine(engine: EngineStats) -> _Values:
    return {
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
    }


def _of_registry(registry: RegistryStats) -> _Values:
    return {
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


def _memory(engine: EngineStats, registry: RegistryStats) -> Metric:
    memory = GaugeMetricFamily(
        "infuse_memory_bytes", "Planned memory by its use.", labels=("part",)
    )
    memory.add_metric(["weights"], engine.weights_bytes)
    memory.add_metric(["kv_cache"], engine.kv_cache_bytes)
    memory.add_metric(["bank"], engine.bank_bytes)
    memory.add_metric(["saved_modules"], registry.saved_bytes)
    memory.add_metric(["unused_adapters"], registry.host_bytes)
    return memory


def _counted(engine: EngineStats, registry: RegistryStats) -> _Values:
    return {
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


def _read_by_gateways(engine: EngineStats, registry: RegistryStats) -> Iterator[Metric]:
    """The gauges that inference gateways choose a server by, under vLLM's names: see Kubernetes'
    gateway-api-inference-extension, proposal 003, "Model Server Protocol"."""
    gauges: _Values = {
        "vllm:num_requests_running": ("As infuse_requests_running.", engine.running),
        "vllm:num_requests_waiting": ("As infuse_requests_waiting.", engine.waiting),
        "vllm:kv_cache_usage_perc": (
            "Share of the KV cache that running sequences reserve, from 0 to 1.",
            engine.kv_tokens_used / engine.kv_tokens_total,
        ),
    }
    yield from _gauges(gauges)
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
