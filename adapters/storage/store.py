"""The store keeps revisions of adapters durably, by content, in a folder on disk or in a bucket.

The journal says which revisions each name has. Content is made durable first, then its event is
appended: after a crash at any moment a name is at its old or its new revision, whole, and every
acknowledged change is there. Start-up reads the journal alone.
"""

import sys
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import TypeVar

from infuse.adapters.errors import (
    AdapterError,
    AdapterExists,
    Overtaken,
    RevisionConflict,
    UnknownAdapter,
)
from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.folder import FolderStorage, digest_of
from infuse.adapters.storage.index import Index
from infuse.adapters.storage.names import check_name
from infuse.adapters.storage.quota import Quota
from infuse.adapters.storage.replicas import Follower
from infuse.adapters.storage.revision import (
    Details,
    DetailsChange,
    Origin,
    Revision,
    revision_to_json,
)
from infuse.adapters.storage.revision_files import RevisionFiles
from infuse.adapters.storage.storage import Kept, Storage

UPLOADED = Origin()
Watcher = Callable[[Mapping[str, Revision | None]], object]
_FAILURES = 2
"""So many failures to follow other servers, one after the other, mean that it cannot be done."""

_T = TypeVar("_T")


class AdapterStore:
    """Owns its storage, alone or with other servers that share it. Thread-safe.

    A change is durable when it returns, and every server that shares the storage answers by it. One
    that raises has changed nothing, except that a change whose answer from a bucket was lost may be
    made all the same. Raises StoreLocked where another process owns the storage, StoreFull where it
    has no room, StoreUnreachable where it cannot be reached. Where servers share the storage, what
    asks for a name raises StoreUnreachable while others may have changed it unknown to this one.
    """

    def __init__(self, storage: Path | Storage, keep_revisions: int = 10) -> None:
        """`keep_revisions`: how many revisions of a name stay reachable; older ones are removed."""
        assert keep_revisions > 0
        self._keep_revisions = keep_revisions
        self._storage = FolderStorage(storage) if isinstance(storage, Path) else storage
        self._replicas = self._storage.replicas
        self._revision_files = RevisionFiles(self._storage)
        self._index = Index()
        self._changes = threading.Lock()
        """Held through a change, also while it waits for the storage."""
        self._journal = threading.Lock()
        """Held while events are read or appended, and taken into the index."""
        self._based_on = 0
        """The number of the last event that the running change knows."""
        self._unused: set[str] = set()
        """Digests that the running change may leave without a reachable revision."""
        self._tell: Watcher = lambda _: None
        try:
            self._recover()
        except BaseException:
            self._storage.close()
            raise
        self._follower = None if self._replicas is None else Follower(self._replicas, self._follow)

    def close(self) -> None:
        if self._follower is not None:
            self._follower.stop()
        self._storage.close()

    def watch(self, tell: Watcher) -> None:
        """Call `tell` with what each change of another server changes: names, with the revision
        before. It must not wait."""
        self._tell = tell

    def check(self) -> None:
        """Raises StoreUnreachable where it is known that no change would last, or that changes of
        other servers may be unknown. Cheap."""
        self._storage.check()
        if self._replicas is not None:
            self._replicas.check()

    @property
    def is_read_only(self) -> bool:
        """Whether adapters can be read and not changed, as far as was noticed."""
        return self._storage.is_read_only

    @property
    def is_behind(self) -> bool:
        """Whether changes of other servers may be unknown for a moment only: this process was
        stopped or had no processor, and will read them as soon as it can. Cheap."""
        if self._replicas is None or self._follower is None or self._replicas.is_current:
            return False
        return self._follower.failures < _FAILURES

    def staging(self) -> AbstractContextManager[Path]:
        """A private folder to write an upload in; it is removed afterwards."""
        return self._storage.staging()

    def create(
        self, name: str, staged: Path, origin: Origin = UPLOADED, quota: Quota | None = None
    ) -> Revision:
        """Create a name with the files in `staged`. Raises AdapterExists, InvalidAdapter,
        QuotaExceeded."""
        check_name(name)
        digest, size = digest_of(staged)

        def change() -> Revision:
            if name in self._index:
                raise AdapterExists(name)
            return self._add_revision(name, staged, digest, size, origin, quota)

        return self._change(change)

    def replace(
        self,
        name: str,
        staged: Path,
        if_match: str | None = None,
        origin: Origin = UPLOADED,
        quota: Quota | None = None,
    ) -> tuple[Revision, bool]:
        """Add a revision, and return it and True. Where the content is the same already, return
        the current revision and False; or True, if its files were damaged and are whole again.

        Raises UnknownAdapter, QuotaExceeded, and RevisionConflict where `if_match` is not the
        current ETag.
        """
        digest, size = digest_of(staged)

        def change() -> tuple[Revision, bool]:
            current = self._require(name, if_match)
            if current.digest != digest:
                return self._add_revision(name, staged, digest, size, origin, quota), True
            kept = self._keep(staged, digest)
            if kept.is_new:
                self._append("mended", name, origin.by, {"digest": digest})
            return current, kept.is_new

        return self._change(change)

    def roll_back(
        self, name: str, number: int, if_match: str | None = None, by: str | None = None
    ) -> tuple[Revision, bool]:
        """Add a revision with the content of `number`, and return it and True. Where the current
        revision has this content, return that and False.

        Raises UnknownAdapter, UnknownRevision, RevisionConflict, and RevisionDamaged.
        """

        def change() -> tuple[Revision, bool]:
            current = self._require(name, if_match)
            wanted = self._index.revision(name, number)
            if wanted.digest == current.digest:
                return current, False
            if self._revision_files.read(wanted, ()) is None:
                self._revision_files.read_again(wanted, ())
            origin = replace(wanted.origin, source=f"rollback to {number}", by=by)
            return self._add_revision(name, None, wanted.digest, wanted.size, origin), True

        return self._change(change)

    def describe(
        self, name: str, change: DetailsChange, if_match: str | None = None, by: str | None = None
    ) -> tuple[Revision, Details]:
        """Change a name's details; return the current revision, with its new ETag, and all details.

        Raises UnknownAdapter, RevisionConflict.
        """

        def make() -> tuple[Revision, Details]:
            current = self._require(name, if_match)
            before = self._index.details(name)
            details = change.applied_to(before)
            if details == before:
                return current, details
            return self._append("details", name, by, asdict(details)), details

        return self._change(make)

    def delete(self, name: str, if_match: str | None = None, by: str | None = None) -> None:
        """Delete a name, at once. Raises UnknownAdapter, RevisionConflict."""

        def change() -> None:
            self._require(name, if_match)
            self._append("delete", name, by, {"number": self._index.last_number(name)})

        self._change(change)

    def drop_replaced_before(self, moment: datetime, most: int = sys.maxsize) -> int:
        """Drop the revisions that were replaced by a newer one before a moment, of `most` names at
        most; return how many. The current one of each name stays."""
        outdated = (name for name in self.names() if self._replaced_before(name, moment))
        names = list(islice(outdated, most))
        return sum(self._change(partial(self._drop_replaced, name, moment)) for name in names)

    def _drop_replaced(self, name: str, moment: datetime) -> int:
        dropped = self._replaced_before(name, moment)
        if dropped:
            self._append("drop", name, None, {"dropped": dropped})
        return dropped

    def _replaced_before(self, name: str, moment: datetime) -> int:
        """Return how many revisions of a name were replaced before a moment."""
        with suppress(UnknownAdapter):
            newer = self._index.revisions(name)[-2::-1]
            return len(list(takewhile(lambda revision: revision.created < moment, newer)))
        return 0

    def current(self, name: str) -> Revision:
        """Raises UnknownAdapter."""
        return self._current_index.current(name)

    def revision(self, name: str, number: int) -> Revision:
        """Raises UnknownAdapter, UnknownRevision."""
        return self._current_index.revision(name, number)

    def revisions(self, name: str) -> list[Revision]:
        """Return the reachable revisions, newest first. Raises UnknownAdapter."""
        return self._current_index.revisions(name)

    def details(self, name: str) -> Details:
        """Raises UnknownAdapter."""
        return self._current_index.details(name)

    def names(self, after: str | None = None, limit: int | None = None) -> list[str]:
        """Return names in order: at most `limit` of those after `after`."""
        return self._current_index.names(after, limit)

    def known(self, name: str) -> tuple[Revision, Details] | None:
        """Return what this server knows of a name, whether it is current or not."""
        with suppress(UnknownAdapter):
            return self._index.current(name), self._index.details(name)
        return None

    def files(self, revision: Revision) -> Path:
        """Return the folder of a revision's files, for reading. It is removed with the last
        revision of this content.

        Whether the files are damaged is not checked: `read` and `verified` do that. Raises
        StoreUnreachable and StoreDamaged where the files must be fetched from a bucket first.
        """
        return self._storage.files(revision)

    def read(self, revision: Revision, names: Container[str]) -> dict[str, bytes]:
        """Return the bytes of the named files that a revision has, exactly as they were stored.

        All files of the revision are read and compared with its digest. Raises RevisionDamaged
        where they differ, and from then on without reading until they are stored anew;
        StoreUnreachable where they cannot be read now; UnknownAdapter and UnknownRevision where the
        revision was deleted meanwhile.
        """
        found = self._revision_files.read(revision, names)
        if found is None:
            with self._newest():
                # A revision that was deleted meanwhile only seems damaged: this raises then.
                self._index.revision(revision.name, revision.number)
                found = self._revision_files.read_again(revision, names)
        return found

    def verified(self, revision: Revision) -> Path:
        """Return `files` after `read` has found them undamaged."""
        self.read(revision, ())
        return self._storage.files(revision)

    def is_damaged(self, revision: Revision) -> bool:
        """Whether `read` has found a revision's files damaged."""
        return self._revision_files.is_damaged(revision)

    @property
    def damaged(self) -> int:
        """How many reachable revisions were found damaged."""
        return sum(self._index.users(digest) for digest in self._revision_files.damaged)

    def was_deleted(self, name: str) -> bool:
        """Whether an adapter of this name was deleted, and there is none now."""
        return name not in self and self._index.last_number(name) > 0

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: object) -> bool:
        return name in self._current_index

    @property
    def _current_index(self) -> Index:
        """Raises StoreUnreachable where other servers may have made changes that are not in it."""
        if self._replicas is not None:
            self._replicas.check()
        return self._index

    def _require(self, name: str, if_match: str | None) -> Revision:
        current = self._index.current(name)
        if if_match is not None and if_match not in ("*", current.etag):
            raise RevisionConflict(name, current.etag)
        return current

    def _add_revision(
        self,
        name: str,
        staged: Path | None,
        digest: str,
        size: int,
        origin: Origin,
        quota: Quota | None = None,
    ) -> Revision:
        """Keep the content first, then append its event: who sees the event finds the content."""
        number = self._index.last_number(name) + 1
        revision = Revision(name, number, digest, datetime.now(UTC), size, origin)
        dropped = max(0, self._index.count(name) + 1 - self._keep_revisions)
        if quota is not None:
            quota.check(self._index, revision, dropped)
        record = {} if staged is None else self._keep(staged, digest).record
        values = {**revision_to_json(revision), "dropped": dropped, **record}
        return self._append("revision", name, origin.by, values)

    def _keep(self, staged: Path, digest: str) -> Kept:
        self._unused.add(digest)
        kept = self._storage.keep(staged, digest, in_use=self._index.users(digest) > 0)
        self._revision_files.forget([digest])
        return kept

    def _append(
        self, event: str, name: str, by: str | None, values: Mapping[str, object]
    ) -> Revision:
        """Append an event to those that the running change knows; return the revision that is
        current then, or was until the event. Raises Overtaken."""
        now = datetime.now(UTC).isoformat()
        whole = {"time": now, "event": event, "name": name, "by": by, **values}
        with self._journal:
            if self._storage.last != self._based_on:
                raise Overtaken
            self._storage.append(whole)
            self._based_on = self._storage.last
            applied = self._index.apply([whole])
            self._unused |= applied.dropped
            # Under the lock, so that it is this server's event and not the next one's.
            known = self.known(name)
        current = applied.before[name] if known is None else known[0]
        assert current is not None, "an event creates a name, or there was one"
        return current

    def _change(self, change: Callable[[], _T]) -> _T:
        """Make a change of the newest state; decide again where another server makes one first.
        Return once every server knows it."""
        unused: set[str] = set()
        while True:
            with self._newest():
                self._unused = unused
                try:
                    changed = change()
                except Overtaken:
                    continue
                except BaseException:
                    self._remove(unused)
                    raise
                if self._replicas is None:
                    self._remove(unused)
                number = self._storage.last
            break
        if self._replicas is not None:
            self._replicas.wait_for(number)
            if unused:
                # The change is made, whether this succeeds or not.
                with suppress(AdapterError), self._newest():
                    self._remove(unused)
        return changed

    def _remove(self, digests: Iterable[str]) -> None:
        """Remove those of the contents that no reachable revision has."""
        unused = [digest for digest in digests if self._index.users(digest) <= 0]
        self._storage.remove(unused)
        self._revision_files.forget(unused)

    @contextmanager
    def _newest(self) -> Iterator[None]:
        """Within: this thread alone changes the store, and the index is as new as the journal."""
        with self._changes, self._storage.turn():
            with self._journal:
                self._take_in(self._storage.settle())
                self._based_on = self._storage.last
            yield

    def _take_in(self, events: Iterable[Event]) -> None:
        """Take in events that another server has appended."""
        applied = self._index.apply(events)
        # Who stored the content has seen that it is whole.
        self._revision_files.forget(applied.stored)
        self._storage.forget(applied.dropped)
        if applied.before:
            self._tell(applied.before)

    def _follow(self) -> None:
        assert self._replicas is not None
        with self._journal:
            self._replicas.follow(self._storage, self._take_in)

    def _recover(self) -> None:
        if self._replicas is None:
            self._index.apply(self._storage.read())
        else:
            self._follow()
        with self._newest():
            self._storage.keep_only(self._index.digests())
