"""What an engine is asked to be, and what it says of itself."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    alive: bool = True
    """False: the model thread has ended on an error, and only a restart helps."""
    ready: bool = True
    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    kv_tokens_cached: int
    """Tokens kept for requests to come, as long as no row needs the room."""
    prefix_queried_tokens: int
    """Tokens of the prompts that were admitted."""
    prefix_hit_tokens: int
    """Those of them that were cached."""
    weights_bytes: int
    """Bytes of the base model, each parameter once."""
    kv_cache_bytes: int
    """The planned budget."""
    compiled: bool
    """Whether the model is."""
    bank_bytes: int
    """Bytes of the columns that adapters have used so far, for all slots."""
    preemptions: int
    steps: int
    step_retries: int
    """Forwards that failed and ran again in parts."""
    prompt_tokens: int
    generated_tokens: int
    drafted_tokens: int
    """Tokens that were computed as drafts, beside the rows' own."""
    accepted_tokens: int
    """Those of them that were accepted."""
