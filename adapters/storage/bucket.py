"""Storage of a store in a bucket, with a local cache of contents.

    content/<digest>/<epoch>-<number>/<file>  an adapter's files
    journal/                                  every change of every adapter: bucket_journal.py
    lease/                                    who owns the bucket: bucket_lease.py

An epoch is one process's ownership of the bucket; later epochs have higher numbers. Content is
written to a folder that was never used before, and its event names the folder. So neither a late
removal, nor a process that has lost the bucket without noticing, can touch what was written since.
"""

import logging
import re
import secrets
import shutil
import socket
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TextIO
from weakref import WeakValueDictionary

from infuse.adapters.errors import AdapterError, StoreDamaged
from infuse.adapters.storage.bucket_journal import BucketJournal
from infuse.adapters.storage.bucket_lease import Lease
from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.folder import ContentFolder, digest_of
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.replicas import Replicas
from infuse.adapters.storage.revision import Revision
from infuse.adapters.storage.storage import Kept

log = logging.getLogger(__name__)

_PREFIX = "content"
_PLACE = re.compile(rf"{_PREFIX}/(?P<digest>[^/]+)/(?P<epoch>\d+)-\d+")
"""The folder of a content."""
_KEY = re.compile(rf"(?P<place>{_PLACE.pattern})/[^/]+")


class BucketStorage:
    """A `Storage` in a bucket. Anything in `cache` may be removed from outside at any time.

    Raises StoreLocked where another process owns the bucket or the cache, StoreFull where either
    has no room, and StoreUnreachable.
    """

    replicas: Replicas | None = None

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
            self._lease = self._take_lease(lease_seconds, renew_every)
        except BaseException:
            self._cache.close()
            objects.close()
            raise
        self._journal = self._make_journal(uuid.uuid4().hex)
        self._places: dict[str, str] = {}
        """Digest -> the folder of its files in the bucket, as the journal says."""
        self._uploaded: dict[str, str] = {}
        """Digest -> the folder of files that this process has uploaded, and no event names yet."""
        self._fetches: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()
        """Digest -> a lock, held while its content is fetched."""
        self._background = ThreadPoolExecutor(1, "bucket-keeper")
        self._compaction: Future[None] | None = None

    def _take_lease(self, seconds: float, renew_every: float) -> Lease:
        return Lease(self._objects, _identity(self._cache.lock), seconds, renew_every)

    def _make_journal(self, writer: str) -> BucketJournal:
        return BucketJournal(self._objects, writer)

    def close(self) -> None:
        self._background.shutdown()
        self._lease.release()
        self._objects.close()
        self._cache.close()

    @property
    def last(self) -> int:
        return self._journal.last

    def read(self) -> list[Event]:
        events = self._journal.read()
        self._note(events)
        self._compact_if_long()
        return events

    def append(self, event: Mapping[str, object]) -> None:
        place = self._places.get(str(event.get("digest")))
        whole = event if place is None or "place" in event else {**event, "place": place}
        self._journal.append(whole)
        self._note([whole])
        self._compact_if_long()

    def settle(self) -> Sequence[Event]:
        events = self._journal.settle()
        self._note(events)
        return events

    def _note(self, events: Iterable[Mapping[str, object]]) -> None:
        """Note where the contents of events are."""
        for digest, place in places_of(events, self._places).items():
            self._places[digest] = place
            if self._uploaded.get(digest) == place:
                del self._uploaded[digest]

    def turn(self) -> AbstractContextManager[object]:
        return nullcontext()

    is_read_only = False

    def check(self) -> None:
        """Do nothing: each change asks the bucket, and a cache that was removed is made again."""

    @contextmanager
    def staging(self) -> Iterator[Path]:
        self._cache.make()
        with self._cache.staging() as folder:
            yield folder

    def keep(self, staged: Path, digest: str, in_use: bool) -> Kept:
        """Keep staged files. Content that the bucket has already is fetched and compared, so that
        damaged content is replaced. What nothing uses any more may be about to be removed: such
        content goes to a new folder."""
        place = self._places.get(digest) if in_use else self._usable(digest)
        is_there = place is not None and (not in_use or self._is_whole(place, digest))
        if place is None:
            place = f"{self._folder_of(digest)}{secrets.randbelow(10**12)}"
        if not is_there:
            # Damaged content is overwritten in its folder, which earlier events name.
            files = {f"{place}/{file.name}": file for file in staged.iterdir()}
            self._objects.put_all(files)
            if in_use:
                self._objects.delete(set(self._objects.list(place)) - files.keys())
            else:
                self._uploaded[digest] = place
        with self._fetch_lock(digest), self.staging() as copy:
            for file in staged.iterdir():
                _link(file, copy / file.name)
            self._cache.put(copy, digest)
        return Kept(not is_there, {"place": place})

    def _usable(self, digest: str) -> str | None:
        """Return where files were uploaded that no event names yet. The next process that opens
        the journal removes them."""
        place = self._uploaded.get(digest, "")
        return place if place.startswith(self._folder_of(digest)) else None

    def _folder_of(self, digest: str) -> str:
        return f"{_PREFIX}/{digest}/{self._journal.epoch:012}-"

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
            places = [self._places.get(digest), self._uploaded.pop(digest, None)]
            self.forget([digest])
            for place in filter(None, places):
                _quietly(partial(self._delete, place))

    def forget(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._places.pop(digest, None)
            self._cache.remove([digest])

    def keep_only(self, digests: Collection[str]) -> None:
        self._cache.keep_only(digests)
        self._places = {each: place for each, place in self._places.items() if each in digests}
        self._background.submit(_quietly, partial(self._delete_leftovers, self._journal.epoch))

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
                self._cache.put(staged, revision.digest)
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

    def _delete_leftovers(self, epoch: int) -> None:
        """Delete contents of epochs before `epoch` that no event names, as crashes leave them."""
        found = map(_KEY.fullmatch, self._objects.list(_PREFIX))
        self._objects.delete(
            key[0]
            for key in found
            if key is not None
            and int(key["epoch"]) < epoch
            and self._places.get(key["digest"]) != key["place"]
        )

    def _compact_if_long(self) -> None:
        if self._journal.is_long and (self._compaction is None or self._compaction.done()):
            self._compaction = self._background.submit(_quietly, self._compact)

    def _compact(self) -> None:
        self._journal.compact()


def places_of(
    events: Iterable[Mapping[str, object]], before: Mapping[str, str] = MappingProxyType({})
) -> dict[str, str]:
    """Return the folder of each content that events name. `before`: what earlier ones have said.

    Events that were written to a folder on disk name none: what is restored of a backup of that
    goes to a folder that no epoch uses. A folder that is none of this content's, as another program
    may have written it, counts as none.
    """
    places: dict[str, str] = {}
    for event in events:
        if "digest" in event:
            digest = str(event["digest"])
            place = _PLACE.fullmatch(str(event.get("place")))
            if place is not None and place["digest"] == digest:
                places[digest] = place[0]
            else:
                unknown = f"{_PREFIX}/{digest}/{0:012}-0"
                places[digest] = places.get(digest) or before.get(digest) or unknown
    return places


def _quietly(work: Callable[[], None]) -> None:
    """Do a clean-up, and only log a failure: nothing depends on it, and it is done again later."""
    try:
        work()
    except AdapterError as error:
        log.warning("Nothing is lost, but a clean-up has failed: %s", error)


def _link(file: Path, target: Path) -> None:
    """Give a file a second name; where the disk cannot, copy it."""
    try:
        target.hardlink_to(file)
    except OSError:
        shutil.copyfile(file, target)


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
