"""How our own engine is set up."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """None: planned from the model and the machine."""

    max_rows: int = 32
    """Requests in one batch."""
    max_queue: int = 256
    """Requests that may wait beside those that run."""
    max_model_len: int | None = None
    kv_cache_tokens: int | None = None
    prefill_chunk_tokens: int | None = None
    prefix_cache: bool = True
    """Keep what ended requests have computed, for later ones that begin alike."""
    pack_linears: bool = True
    speculation: bool = False
    """Draft tokens where it pays, for requests that do not say."""
    trace_cache: Path | None = None
    """Where the traced forward is kept for later starts; None: each start traces it."""
    compile_cache: Path | None = None
    """Compile what can be, and keep it there; None: run the model as it is."""
