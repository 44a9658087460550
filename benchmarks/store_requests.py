"""What servers that share a bucket ask of it, counted on a virtual clock, while nothing changes and
for each change. The journal and what its readers show are the server's own code.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any
from unittest.mock import patch

from obstore.store import MemoryStore

from infuse.adapters.storage import replicas
from infuse.adapters.storage.bucket_journal import SharedBucketJournal
from infuse.adapters.storage.bucket_lease import SharedLease
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.replicas import LEASE_SECONDS, Replicas

RENEW_SECONDS = 5.0
"""How often each server renews the lease of the bucket."""
IDLE_SECONDS = 60.0
CHANGES = 10


class Counted(Objects):
    """A bucket that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(MemoryStore(), "memory://")
        self.requests: Counter[str] = Counter()

    def create(self, key: str, data: bytes) -> bool:
        self.requests["PUT"] += 1
        return super().create(key, data)

    def put(self, key: str, data: bytes) -> None:
        self.requests["PUT"] += 1
        super().put(key, data)

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        self.requests["GET"] += len(keys)
        return super().get_all(keys)

    def list(self, prefix: str) -> "list[str]":
        self.requests["LIST"] += 1
        return super().list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        gone = [*keys]
        self.requests["DELETE"] += len(gone)
        super().delete(gone)


class Clock:
    """Time, in which servers follow what others change. It stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.servers: list[Server] = []

    def clock_gettime(self, _: int) -> float:
        return self.now

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        until = self.now + seconds
        while (first := min(self.servers, key=lambda each: each.next_look)).next_look <= until:
            self.now = first.next_look
            first.follow()
        self.now = until


class Server:
    def __init__(self, bucket: Objects, number: int) -> None:
        self.replicas = Replicas(bucket)
        self.journal = SharedBucketJournal(bucket, str(number), self.replicas)
        self.next_look = 0.0

    def follow(self) -> None:
        self.replicas.follow(self.journal, lambda _: None)
        self.next_look += self.replicas.pause

    def change(self) -> None:
        """As a store changes an adapter's details: a new revision also writes its files."""
        self.journal.settle()
        self.journal.append({"event": "details", "name": "any"})
        self.replicas.wait_for(self.journal.last)


def count(servers: int) -> dict[str, Any]:
    """Requests of each server in a second, and of all servers for a change; and how long a change
    waits, on a network that takes no time."""
    bucket, clock = Counted(), Clock()
    with patch.object(replicas, "time", clock):
        for number in range(servers):
            server = Server(bucket, number)
            # Servers do not look at the same moments.
            server.next_look = clock.now + server.replicas.pause * number / servers
            server.follow()
            clock.servers.append(server)
        clock.sleep(LEASE_SECONDS)

        before = bucket.requests.copy()
        clock.sleep(IDLE_SECONDS)
        idle = bucket.requests - before

        before, begun = bucket.requests.copy(), clock.now
        for change in range(CHANGES):
            clock.servers[change % servers].change()
        changing, seconds = bucket.requests - before, clock.now - begun
    bucket.close()
    per_second = {each: idle[each] / IDLE_SECONDS for each in idle}
    for each, n in renewal().items():
        per_second[each] = per_second.get(each, 0.0) + servers * n / RENEW_SECONDS
    beside = {each: seconds * idle[each] / IDLE_SECONDS for each in changing}
    return {
        "servers": servers,
        "per_server_and_second": {each: n / servers for each, n in per_second.items()},
        "per_change": {each: (n - beside[each]) / CHANGES for each, n in changing.items()},
        "change_seconds": seconds / CHANGES,
    }


def renewal() -> Counter[str]:
    """What a renewal of the bucket's lease asks: taking it where servers hold it together."""
    bucket = Counted()
    first = SharedLease(bucket)
    before = bucket.requests.copy()
    second = SharedLease(bucket)
    asked = bucket.requests - before
    first.stop()
    second.stop()
    bucket.close()
    return asked
