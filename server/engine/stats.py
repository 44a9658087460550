"""What an engine says about itself, for probes and metrics."""

from dataclasses import dataclass


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
