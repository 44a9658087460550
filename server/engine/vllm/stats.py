"""Counts what vLLM reports after each step."""

from collections.abc import Callable
from typing import Any


class Counts:
    """The latest report, and the sums of all."""

    def __init__(self) -> None:
        self.steps = self.preemptions = self.prompt_tokens = self.generated_tokens = 0
        self.prefix_queried_tokens = self.prefix_hit_tokens = 0
        self.running = 0
        self.kv_cache_usage = 0.0
        """The share of the KV cache that is in use."""
        self.stepped: Callable[[], None] = lambda: None
        """Called after each step."""

    def logger(self, _config: Any, _engine: int = 0) -> Any:
        """vLLM's factory of a logger, which reports to these counts."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        counts = self

        class Logger(StatLoggerBase):  # type: ignore[misc]
            def __init__(self) -> None:
                pass

            def record(self, scheduler: Any, iteration: Any, *_: Any, **__: Any) -> None:
                counts.record(scheduler, iteration)

            def log_engine_initialized(self) -> None:
                pass

        return Logger()

    def record(self, scheduler: Any, iteration: Any) -> None:
        if scheduler is not None:
            self.running = scheduler.num_running_reqs
            self.kv_cache_usage = scheduler.kv_cache_usage
            self.prefix_queried_tokens += scheduler.prefix_cache_stats.queries
            self.prefix_hit_tokens += scheduler.prefix_cache_stats.hits
        if iteration is not None:
            self.steps += 1
            self.stepped()
            self.preemptions += iteration.num_preempted_reqs
            self.prompt_tokens += iteration.prompt_token_stats.computed
            self.generated_tokens += iteration.num_generation_tokens
