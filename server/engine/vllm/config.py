"""The settings of the vLLM engine, and the names by which its processes pass things on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PLAN = "ia3"
"""The key, in vLLM's `additional_config`, of what the workers must know of adapters. It is a part
of the key of vLLM's compile cache."""
SLOT = "ia3_slot"
"""The key of a request's slot in vLLM's `SamplingParams.extra_args`."""

SERVER = "INFUSE_SERVER_PID"
"""The environment variable that tells the workers the id of the server's process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    max_rows: int = 32
    """The most requests in one batch."""
    max_queue: int = 256
    """The queue capacity: how many requests may wait beside those that run."""
    max_queue_seconds: float = math.inf
    """How long a request may have to wait, by the engine's estimate, to be admitted."""
    hang_timeout: float = 300.0
    """Seconds that a step may take of which nothing is known."""
    max_model_len: int | None = None
    max_adapters: int = 64
    """How many adapters can be resident at once."""
    dtype: str = "auto"
    kv_cache_tokens: int | None = None
    prefill_chunk_tokens: int | None = None
    prefix_cache: bool = True
    targets: str = ""
    """The modules that adapters may rescale: see `targets.planned_targets`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's engine, by vLLM's names."""
