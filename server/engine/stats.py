"""The engine's state and counters, for probes and metrics."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of an engine. Counters count since its start."""

    alive: bool = True
    """False: the model has ended on an error, or hangs, and only a restart helps."""
    ready: bool = True
    """Whether new requests are taken: the engine has started and is not shutting down."""
    running: int
    """Sequences in the running batch."""
    most_running: int = 0
    """Rows of the batch."""
    running_adapters: frozenset[str] = frozenset()
    """The adapters of the running batch, as requests name them."""
    waiting: int = 0
    """Requests in the queue."""
    most_waiting: int = 0
    """The queue capacity."""
    wait_seconds: float = 0.0
    """How long a new request would wait in the queue, by the engine's estimate."""
    overloaded: bool = False
    """Whether the queue is nearly full, or the wait nearly as long as it may be."""
    waiting_adapters: frozenset[str] = frozenset()
    """The adapters of the requests in the queue, as these name them."""
    waiting_tokens: int = 0
    """Tokens that the requests in the queue are charged at least: `fair_queue.least_charge`."""
    kv_tokens_used: int
    """Tokens of the KV cache that are reserved for running sequences."""
    kv_tokens_total: int
    """The size of the KV cache in tokens."""
    kv_block_tokens: int | None
    """Tokens of a block of the prefix cache. None: its blocks differ in size."""
    kv_tokens_cached: int | None
    """Tokens in cached blocks, which are evicted when a sequence needs the room. None: the engine
    does not tell."""
    prefix_queried_tokens: int
    """Tokens of the prompts that were admitted."""
    prefix_hit_tokens: int
    """How many of the queried tokens were prefix hits."""
    weights_bytes: int
    """Bytes of the base model, each parameter once."""
    kv_cache_bytes: int
    """Bytes that were planned for the KV cache."""
    compiled: bool
    """Whether the model is compiled."""
    bank_bytes: int
    """Bytes of the bank, which grows for all slots when an adapter needs further columns."""
    preemptions: int
    steps: int
    """Steps of the running batch."""
    step_retries: int
    """Forwards that failed and were run again in parts."""
    prompt_tokens: int
    """Prompt tokens that were computed; those of a preempted sequence count again."""
    generated_tokens: int
    """Tokens of answers."""
    drafted_tokens: int
    """Drafted tokens that were verified."""
    accepted_tokens: int
    """Drafted tokens that were accepted."""

    @property
    def is_busy(self) -> bool:
        """Whether requests run or wait."""
        return self.running + self.waiting > 0
