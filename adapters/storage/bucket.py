"""Storage of a store in a bucket, with a local cache of contents.

    content/<digest>/<epoch>-<count>/<file>   an adapter's files
    journal/                                  every change of every adapter: bucket_journal.py
    lease/                                    who owns the bucket: bucket_lease.py

An epoch is one process's ownership of the bucket; later epochs have higher numbers. Content is
written to a folder that was never used before, and its event names the folder. So neither a late
removal, nor a process that has lost the bucket without noticing, can touch what was written since.
"""

import itertools
import logging
import re
import socket
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO
from weakref import WeakValueDictionary

from adapters.errors import AdapterError, StoreDamaged
from adapters.storage.bucket_journal import BucketJournal
from adapters.storage.bucket_lease import Lease
from adapters.storage.folder import ContentFolder, digest_of
from adapters.storage.journal import Event
from adapters.storage.objects import Objects
from adapters.storage.revision import Revision

log = logging.getLogger(__name__)

_PREFIX = "content"
_KEY = re.compile(rf"(?P<place>{_PREFIX}/(?P<digest>[^/]+)/(?P<epoch>\d+)-\d+)/[^/]+")


class BucketStorage:
    """A `Storage` in a bucket. Anything in `cache` may be removed from outside at any time.

    Raises StoreLocked where another process owns the bucket or the cache, StoreFull where either
    has no room, and StoreUnreachable.
    """

    def __init__(
        self,
        objects: Objects,
        cache: Path,
        lease_seconds: float = 30.0,
        renew_every: float = 5.0,
    ) -> None:
        """`lease_seconds`: how long a bucket stays owned after its owner has died."""
        self._objects = objects
        self._cache = ContentFolder(cache)
        try:
            self._lease = Lease(objects, _identity(self._cache.lock), lease_seconds, renew_every)
        except BaseException:
            self._cache.close()
            objects.close()
            raise
        self._journal = BucketJournal(objects, uuid.uuid4().hex)
        self._places: dict[str, str] = {}
        """Digest -> the folder of its files in the bucket."""
        self._count = itertools.count()
        self._fetches: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        """Digest -> a lock, held while its content is fetched."""
        self._background = ThreadPoolExecutor(1, "bucket-keeper")
        self._compaction: Future[None] | None = None

    def close(self) -> None:
        self._background.shutdown()
        self._lease.release()
        self._objects.close()
        self._cache.close()

    def read(self) -> list[Event]:
        events = self._journal.read()
        self._places = {
            str(event["digest"]): str(event["place"])
            for event in events
            if {"digest", "place"} <= event.keys()
        }
        self._compact_if_long()
        return events

    def append(self, event: Mapping[str, object]) -> None:
        place = self._places.get(str(event.get("digest")))
        self._journal.append(event if place is None else {**event, "place": place})
        self._compact_if_long()

    def settle(self) -> Sequence[Event]:
        return self._journal.settle()

    def check(self) -> None:
        """Do nothing: each change asks the bucket, and a cache that was removed is made again."""

    @contextmanager
    def staging(self) -> Iterator[Path]:
        self._cache.make()
        with self._cache.staging() as folder:
            yield folder

    def keep(self, staged: Path, digest: str) -> bool:
        """Keep staged files. Content that the bucket has already is fetched and compared, so that
        damaged content is replaced."""
        place = self._places.get(digest)
        is_whole = place is not None and self._is_whole(place, digest)
        if not is_whole:
            # Damaged content is overwritten in its folder, which earlier events name.
            new = f"{_PREFIX}/{digest}/{self._journal.epoch:012}-{next(self._count)}"
            place = self._places.setdefault(digest, new)
            files = {f"{place}/{file.name}": file for file in staged.iterdir()}
            self._objects.put_all(files)
            if place != new:
                self._objects.delete(set(self._objects.list(place)) - files.keys())
        with self._fetch_lock(digest):
            self._cache.keep(staged, digest)
        return not is_whole

    def files(self, revision: Revision) -> Path:
        """Raises StoreDamaged where the bucket no longer has what was stored."""
        cached = self._cache.path(revision.digest)
        if revision.digest in self._places and not _is_whole(cached, revision):
            with self._fetch_lock(revision.digest):
                place = self._places.get(revision.digest)
                if place is not None and not _is_whole(cached, revision):
                    self._fetch(revision, place)
        return cached

    def refresh(self, revision: Revision) -> None:
        with self._fetch_lock(revision.digest):
            place = self._places.get(revision.digest)
            if place is not None:
                self._fetch(revision, place)

    def remove(self, digests: Iterable[str]) -> None:
        if self._journal.in_doubt:
            # The event may be in the journal, and then its content is needed.
            return
        for digest in digests:
            place = self._places.pop(digest, None)
            self._cache.remove([digest])
            if place is not None:
                _quietly(partial(self._delete, place))

    def keep_only(self, digests: Collection[str]) -> None:
        self._cache.keep_only(digests)
        self._places = {each: place for each, place in self._places.items() if each in digests}
        self._background.submit(_quietly, self._delete_leftovers)

    def _fetch_lock(self, digest: str) -> threading.Lock:
        return self._fetches.setdefault(digest, threading.Lock())

    def _is_whole(self, place: str, digest: str) -> bool:
        with self.staging() as fetched:
            self._download(place, fetched)
            return digest_of(fetched)[0] == digest

    def _fetch(self, revision: Revision, place: str) -> None:
        with self.staging() as staged:
            self._download(place, staged)
            if digest_of(staged)[0] == revision.digest:
                self._cache.remove([revision.digest])
                self._cache.keep(staged, revision.digest)
            elif revision.digest in self._places:
                raise StoreDamaged(
                    f"The files of {revision.name}@{revision.number} in {self._objects.url} are "
                    "not those that were stored; upload the adapter again."
                )

    def _download(self, place: str, folder: Path) -> None:
        keys = self._objects.list(place)
        self._objects.fetch_all({key: folder / key.rpartition("/")[2] for key in keys})

    def _delete(self, place: str) -> None:
        self._objects.delete(self._objects.list(place))

    def _delete_leftovers(self) -> None:
        """Delete contents of earlier epochs that no event names, as crashes leave them."""
        found = map(_KEY.fullmatch, self._objects.list(_PREFIX))
        self._objects.delete(
            key[0]
            for key in found
            if key is not None
            and int(key["epoch"]) < self._journal.epoch
            and self._places.get(key["digest"]) != key["place"]
        )

    def _compact_if_long(self) -> None:
        if self._journal.is_long and (self._compaction is None or self._compaction.done()):
            self._compaction = self._background.submit(_quietly, self._journal.compact)


def _quietly(work: Callable[[], None]) -> None:
    """Do a clean-up, and only log a failure: nothing depends on it, and it is done again later."""
    try:
        work()
    except AdapterError as error:
        log.warning("Nothing is lost, but a clean-up has failed: %s", error)


def _identity(lock: TextIO) -> str:
    """Return the owner's id, which is in the cache's lock file and so outlives a crash."""
    lock.seek(0)
    text = lock.read()
    if not text:
        text = uuid.uuid4().hex
        lock.write(text)
        lock.flush()
    # With the host, so that a copy of the cache on another machine is another owner.
    return f"{socket.gethostname()}/{text}"


def _is_whole(folder: Path, revision: Revision) -> bool:
    """Whether a cached folder has all its bytes: others may have deleted some of its files."""
    try:
        return sum(file.stat().st_size for file in folder.iterdir()) == revision.size
    except FileNotFoundError:
        return False
