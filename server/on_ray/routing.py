"""Chooses a replica for each request: one that knows its adapter and its prompt's beginning.

Replicas are ranked by rendezvous hashing, so that all proxies agree without a word, and a replica
that comes or goes moves only the requests that it gets or had.
"""

import hashlib
import random
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from server.on_ray.affinity import MERGES

_HOMES = 2
"""Replicas that an adapter's requests go to, so that it need not be resident on all."""
_BUSIER = 4
"""Requests that a replica may have more than the least busy one, and still be preferred."""


def ranked(replicas: Sequence[str], affinity: str) -> list[str]:
    """Rank replicas for an affinity. The first ones are the adapter's homes, in an order that the
    prompt's beginning decides."""
    adapter = affinity.partition("-")[0]
    by_adapter = sorted(replicas, key=lambda replica: _weight(adapter, replica))
    homes = by_adapter[:_HOMES]
    return sorted(homes, key=lambda home: _weight(affinity, home)) + by_adapter[_HOMES:]


def _weight(key: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{key} {replica}".encode(), digest_size=8).digest()


def first_free(replicas: Sequence[str], busy: dict[str, int]) -> str:
    """The first of the ranked replicas that is not much busier than the least busy one."""
    most = min(busy.values()) + _BUSIER
    return next(replica for replica in replicas if busy[replica] <= most)


class AffinityRouter(RequestRouter):
    """Serve's router. Requests without an affinity go to the less busy of two replicas."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The chosen one; and the others, for when it is full or dead."""
        ready = [each for each in candidate_replicas if each.routing_stats.get("ready", True)]
        replicas = ready or candidate_replicas
        affinity = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True
            affinity = pending_request.metadata.session_id
        if not affinity:
            return [random.sample(replicas, min(2, len(replicas)))]
        chosen = _with_merges(replicas) if affinity == MERGES else self._chosen(replicas, affinity)
        return [[chosen], [each for each in replicas if each is not chosen]]

    def _chosen(self, replicas: list[RunningReplica], affinity: str) -> RunningReplica:
        by_id = {each.replica_id.unique_id: each for each in replicas}
        lengths = self.replica_queue_len_cache
        busy = {name: lengths.get(each.replica_id) or 0 for name, each in by_id.items()}
        return by_id[first_free(ranked(list(by_id), affinity), busy)]


def _with_merges(replicas: list[RunningReplica]) -> RunningReplica:
    return min(replicas, key=_number)


def _number(replica: RunningReplica) -> tuple[Any, str]:
    return replica.replica_metadata.get("number", 0), replica.replica_id.unique_id
