"""Storage of a store in a bucket that several servers share."""

from collections.abc import Sequence
from pathlib import Path

from infuse.adapters.storage.bucket import BucketStorage
from infuse.adapters.storage.bucket_journal import SharedBucketJournal
from infuse.adapters.storage.bucket_lease import SharedLease
from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.replicas import LEASE_SECONDS, Replicas


class SharedBucketStorage(BucketStorage):
    """A `Storage` in a bucket that other servers change too. Each has a cache of its own.

    An event of content names a folder that its server has just filled, or one that a reachable
    revision uses as of the event before. So whoever removes the folder of a content that nobody
    uses any more takes nothing from others, whenever that is.
    """

    replicas: Replicas
    _lease: SharedLease

    def __init__(
        self, objects: Objects, journal: Objects, cache: Path, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        """`journal`: the same objects, of which requests fail in a part of `lease_seconds`.
        `lease_seconds`: see `Replicas`."""
        self._shared = journal
        self.replicas = Replicas(journal, lease_seconds)
        super().__init__(objects, cache)

    def _take_lease(self, seconds: float, renew_every: float) -> SharedLease:
        return SharedLease(self._shared, seconds, renew_every)

    def _make_journal(self, writer: str) -> SharedBucketJournal:
        return SharedBucketJournal(self._shared, writer, self.replicas)

    def read(self) -> list[Event]:
        self._lease.check()
        return super().read()

    def settle(self) -> Sequence[Event]:
        self._lease.check()
        return super().settle()

    def close(self) -> None:
        self.replicas.leave()
        # The lease is for all: the last server gives it back.
        if not self.replicas.is_alone:
            self._lease.stop()
        super().close()
        self._shared.close()

    def _compact(self) -> None:
        # Others read single events, so those that they have not read stay.
        last = self._journal.last
        self._journal.compact(min(last, self.replicas.all_have()))
