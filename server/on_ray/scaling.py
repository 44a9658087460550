"""Decides how many replicas there are, by the tokens in their queues."""

import math
from typing import Any

from ray.serve.config import AutoscalingContext


class ByQueuedTokens:
    """Serve's autoscaling policy. Serve itself keeps to the bounds and the delays."""

    def __init__(self, tokens: int, rows: int) -> None:
        """`tokens`: how many may wait per replica. `rows`: the size of a replica's batch."""
        self._tokens = tokens
        self._rows = rows

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        metrics = context.aggregated_metrics or {}
        waiting, running = (sum(metrics.get(name, {}).values()) for name in ("waiting", "running"))
        # What runs must have rows: a queue that is empty for a moment removes no busy replica.
        return max(math.ceil(waiting / self._tokens), math.ceil(running / self._rows), 1), {}
