"""The settings of our own engine."""

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """An engine's settings. Sizes that are None are planned from the model and the machine."""

    max_rows: int = 32
    """The most requests in one batch."""
    max_queue: int = 256
    """The queue capacity: how many requests may wait beside those that run."""
    max_queue_seconds: float = math.inf
    """How long a request may have to wait, by the engine's estimate, to be admitted."""
    hang_timeout: float = 300.0
    """Seconds that a step may take of which nothing is known."""
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    prefill_chunk_tokens: int | None = None
    prefix_cache: bool = True
    """Keep keys and values of ended requests for later ones with the same prefix."""
    pack_linears: bool = True
    speculation: bool = False
    """Draft tokens where it pays, for requests that do not choose."""
    trace_cache: Path | None = None
    """The folder that keeps the traced forward for later starts. None: each start traces it."""
    compile_cache: Path | None = None
    """The folder that keeps the compiled model. None: the model is not compiled."""
