"""Chooses a replica for each request: one that knows its adapter and its prompt's beginning.

Replicas are ranked by rendezvous hashing, so that all proxies agree without a word, and a replica
that comes or goes moves only the requests that it gets or had.
"""

import hashlib
import random
from collections.abc import Callable, Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from infuse.server.on_ray.affinity import MERGES

_HOMES = 2
"""Replicas that an adapter's requests go to, so that it need not be resident on all."""
_BUSIER = 4
"""Requests that a replica may have more than the least busy one, and still be preferred."""


class AffinityRouter(RequestRouter):
    """Serve's router."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return choose(candidate_replicas, "", self._length)
        # Serve waits a little before it asks again.
        pending_request.routing_context.should_backoff = True
        return choose(candidate_replicas, pending_request.metadata.session_id, self._length)

    def _length(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0


def choose(
    replicas: Sequence[RunningReplica],
    affinity: str,
    length: Callable[[RunningReplica], int],
) -> list[list[RunningReplica]]:
    """Groups of replicas: Serve takes the least busy of the first group that is alive and has room.

    `length`: how many requests a replica has. Replicas that are not ready are chosen only where
    none is. Without an affinity, the less busy of two goes first.
    """
    ready = [each for each in replicas if each.routing_stats.get("ready", True)] or [*replicas]
    if not affinity:
        return [random.sample(ready, min(2, len(ready))), ready]
    if affinity == MERGES:
        return [[min(ready, key=_number)]]
    ranks = ranked(ready, affinity)
    most = min(map(length, ranks)) + _BUSIER
    first = next(each for each in ranks if length(each) <= most)
    return [[first], [each for each in ranks if each is not first]]


def ranked(replicas: Sequence[RunningReplica], affinity: str) -> list[RunningReplica]:
    """Rank replicas: first the adapter's homes, in an order that the prompt's beginning decides."""
    adapter = affinity.partition("-")[0]
    by_adapter = sorted(replicas, key=lambda each: _weight(adapter, each))
    homes, others = by_adapter[:_HOMES], by_adapter[_HOMES:]
    return sorted(homes, key=lambda each: _weight(affinity, each)) + others


def _weight(key: str, replica: RunningReplica) -> bytes:
    text = f"{key} {replica.replica_id.unique_id}"
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _number(replica: RunningReplica) -> tuple[int, str]:
    return replica.replica_metadata.get("number", 0), replica.replica_id.unique_id
