"""The questions that a run answers, in their order."""

from collections.abc import Callable
from typing import Any

from benchmarks.bench import Bench
from benchmarks.sections import adapters, http, latency, memory, on_vllm, peers, replicas, reuse

SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "adapters": adapters.measure,
    "peers": peers.measure,
    "bfloat16": peers.measure_bfloat16,
    "on-vllm": on_vllm.measure,
    "http": http.measure,
    "load": latency.measure_load,
    "generator": http.measure_generator,
    "prefix": reuse.measure_prefix,
    "speculation": reuse.measure_speculation,
    "long-prompt": latency.measure_long_prompt,
    "memory": memory.measure,
    "replicas": replicas.measure,
}
