"""The store keeps revisions of adapters durably, by content, in a folder on disk or in a bucket.

The journal says which revisions each name has. Content is made durable first, then its event is
appended: after a crash at any moment a name is at its old or its new revision, whole, and every
acknowledged change is there. Start-up reads the journal alone.
"""

import logging
import threading
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from adapters.errors import (
    AdapterExists,
    RevisionConflict,
    RevisionDamaged,
    StoreDamaged,
    StoreUnreachable,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.storage.folder import FolderStorage, digest_of, read_files
from adapters.storage.journal import Event
from adapters.storage.names import check_name
from adapters.storage.revision import (
    Details,
    DetailsChange,
    Origin,
    Revision,
    details_from_json,
    revision_from_json,
    revision_to_json,
)
from adapters.storage.storage import Storage

log = logging.getLogger(__name__)

UPLOADED = Origin()


@dataclass(slots=True)
class _Adapter:
    """What is in memory for a name."""

    last_number: int = 0
    reachable: list[Revision] = field(default_factory=list)
    """Oldest first, since the name was last created; empty once it is deleted."""
    details: Details = field(default_factory=Details)
    edits: int = 0
    """How often the details were changed since the name was last created."""


class AdapterStore:
    """Owns its storage: no other process may write there. Thread-safe.

    A change is durable when it returns. One that raises has changed nothing, except that a change
    whose answer from a bucket was lost may be made all the same. Raises StoreLocked where another
    process owns the storage, StoreFull where it has no room, StoreUnreachable where it cannot be
    reached.
    """

    def __init__(self, storage: Path | Storage, keep_revisions: int = 10) -> None:
        """`keep_revisions`: how many revisions of a name stay reachable; older ones are removed."""
        assert keep_revisions > 0
        self._keep_revisions = keep_revisions
        self._storage = FolderStorage(storage) if isinstance(storage, Path) else storage
        self._changes = threading.Lock()
        """Held through a change, also while it waits for the storage."""
        self._mutex = threading.RLock()
        """Guards the fields below; never held while a thread waits for the storage."""
        self._adapters: dict[str, _Adapter] = {}
        self._sorted: list[str] = []
        self._users: Counter[str] = Counter()
        """Digest -> how many reachable revisions have that content."""
        self._damaged: set[str] = set()
        """Digests of damaged contents, which are not read again until they are stored anew."""
        try:
            self._recover()
        except BaseException:
            self._storage.close()
            raise

    def close(self) -> None:
        self._storage.close()

    def check(self) -> None:
        """Raises StoreUnreachable where it is known that no change would last. Cheap."""
        self._storage.check()

    def staging(self) -> AbstractContextManager[Path]:
        """A private folder to write an upload in; it is removed afterwards."""
        return self._storage.staging()

    def create(self, name: str, staged: Path, origin: Origin = UPLOADED) -> Revision:
        """Create a name with the files in `staged`. Raises AdapterExists, InvalidAdapter."""
        check_name(name)
        digest, size = digest_of(staged)
        with self._changing():
            if name in self:
                raise AdapterExists(name)
            return self._add_revision(name, staged, digest, size, origin)

    def replace(
        self,
        name: str,
        staged: Path,
        if_match: str | None = None,
        origin: Origin = UPLOADED,
    ) -> tuple[Revision, bool]:
        """Add a revision, and return it and True. Where the content is the same already, return
        the current revision and False; or True, if its files were damaged and are whole again.

        Raises UnknownAdapter, and RevisionConflict where `if_match` is not the current ETag.
        """
        digest, size = digest_of(staged)
        with self._changing():
            current = self._require(name, if_match)
            if current.digest == digest:
                return current, self._keep(staged, digest)
            return self._add_revision(name, staged, digest, size, origin), True

    def roll_back(
        self, name: str, number: int, if_match: str | None = None, by: str | None = None
    ) -> tuple[Revision, bool]:
        """Add a revision with the content of `number`, and return it and True. Where the current
        revision has this content, return that and False.

        Raises UnknownAdapter, UnknownRevision, RevisionConflict, and RevisionDamaged.
        """
        with self._changing():
            current = self._require(name, if_match)
            wanted = self.revision(name, number)
            if wanted.digest == current.digest:
                return current, False
            if self._read(wanted, ()) is None:
                self._read_again(wanted, ())
            origin = replace(wanted.origin, source=f"rollback to {number}", by=by)
            return self._add_revision(name, None, wanted.digest, wanted.size, origin), True

    def describe(
        self, name: str, change: DetailsChange, if_match: str | None = None, by: str | None = None
    ) -> tuple[Revision, Details]:
        """Change a name's details; return the current revision, with its new ETag, and all details.

        Raises UnknownAdapter, RevisionConflict.
        """
        with self._changing():
            self._require(name, if_match)
            adapter = self._adapters[name]
            details = change.applied_to(adapter.details)
            if details != adapter.details:
                self._append("details", name, by, asdict(details))
                with self._mutex:
                    self._edit(adapter, details)
            return adapter.reachable[-1], details

    def delete(self, name: str, if_match: str | None = None, by: str | None = None) -> None:
        """Delete a name, at once. Raises UnknownAdapter, RevisionConflict."""
        with self._changing():
            self._require(name, if_match)
            adapter = self._adapters[name]
            self._append("delete", name, by, {"number": adapter.last_number})
            with self._mutex:
                gone = self._forget(adapter, len(adapter.reachable))
                adapter.details, adapter.edits = Details(), 0
                self._sorted.remove(name)
            self._collect(gone)

    def current(self, name: str) -> Revision:
        with self._mutex:
            return self._find(name).reachable[-1]

    def revision(self, name: str, number: int) -> Revision:
        """Raises UnknownAdapter, UnknownRevision."""
        for revision in self.revisions(name):
            if revision.number == number:
                return revision
        raise UnknownRevision(name, number)

    def revisions(self, name: str) -> list[Revision]:
        """Return the reachable revisions, newest first. Raises UnknownAdapter."""
        with self._mutex:
            return self._find(name).reachable[::-1]

    def details(self, name: str) -> Details:
        """Raises UnknownAdapter."""
        with self._mutex:
            return self._find(name).details

    def names(self, after: str | None = None, limit: int | None = None) -> list[str]:
        """Return names in order: at most `limit` of those after `after`."""
        with self._mutex:
            start = 0 if after is None else bisect_right(self._sorted, after)
            return self._sorted[start : None if limit is None else start + limit]

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
        found = self._read(revision, names)
        if found is None:
            with self._changes:
                # A revision that was deleted meanwhile only seems damaged: this raises then.
                self.revision(revision.name, revision.number)
                self._storage.check()
                found = self._read_again(revision, names)
        return found

    def verified(self, revision: Revision) -> Path:
        """Return `files` after `read` has found them undamaged."""
        self.read(revision, ())
        return self._storage.files(revision)

    def is_damaged(self, revision: Revision) -> bool:
        """Whether `read` has found a revision's files damaged."""
        return revision.digest in self._damaged

    @property
    def damaged(self) -> int:
        """How many reachable revisions were found damaged."""
        with self._mutex:
            return sum(self._users[digest] for digest in self._damaged)

    def was_deleted(self, name: str) -> bool:
        """Whether an adapter of this name was deleted, and there is none now."""
        with self._mutex:
            return name not in self and self._adapters.get(name, _Adapter()).last_number > 0

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._adapters.get(name, _Adapter()).reachable)

    def _find(self, name: str) -> _Adapter:
        if name not in self:
            raise UnknownAdapter(name)
        return self._adapters[name]

    def _require(self, name: str, if_match: str | None) -> Revision:
        current = self.current(name)
        if if_match is not None and if_match not in ("*", current.etag):
            raise RevisionConflict(name, current.etag)
        return current

    def _add_revision(
        self, name: str, staged: Path | None, digest: str, size: int, origin: Origin
    ) -> Revision:
        """Keep the content first, then append its event: who sees the event finds the content."""
        adapter = self._adapters.get(name, _Adapter())
        revision = Revision(name, adapter.last_number + 1, digest, datetime.now(UTC), size, origin)
        dropped = max(0, len(adapter.reachable) + 1 - self._keep_revisions)
        try:
            if staged is not None:
                self._keep(staged, digest)
            values = {**revision_to_json(revision), "dropped": dropped}
            self._append("revision", name, origin.by, values)
        except BaseException:
            self._collect([digest])
            raise
        with self._mutex:
            if not adapter.reachable:
                insort(self._sorted, name)
            self._adapters[name] = adapter
            self._enter(adapter, revision)
            gone = self._forget(adapter, dropped)
            revision = adapter.reachable[-1]
        self._collect(gone)
        return revision

    def _keep(self, staged: Path, digest: str) -> bool:
        """Keep content; False where it was there, undamaged."""
        written = self._storage.keep(staged, digest)
        with self._mutex:
            self._damaged.discard(digest)
        return written

    def _enter(self, adapter: _Adapter, revision: Revision) -> None:
        adapter.last_number = revision.number
        adapter.reachable.append(replace(revision, edits=adapter.edits))
        self._users[revision.digest] += 1

    def _edit(self, adapter: _Adapter, details: Details) -> None:
        adapter.details = details
        adapter.edits += 1
        if adapter.reachable:
            adapter.reachable[-1] = replace(adapter.reachable[-1], edits=adapter.edits)

    def _forget(self, adapter: _Adapter, count: int) -> list[str]:
        """Drop the oldest `count` revisions of a name; return their digests."""
        gone = [revision.digest for revision in adapter.reachable[:count]]
        del adapter.reachable[:count]
        self._users.subtract(gone)
        return gone

    def _append(self, event: str, name: str, by: str | None, values: Mapping[str, object]) -> None:
        now = datetime.now(UTC).isoformat()
        self._storage.append({"time": now, "event": event, "name": name, "by": by, **values})

    def _collect(self, digests: Iterable[str]) -> None:
        """Remove those of the contents that no reachable revision has."""
        unused = [digest for digest in digests if self._users[digest] <= 0]
        self._storage.remove(unused)
        with self._mutex:
            self._damaged.difference_update(unused)

    def _read(self, revision: Revision, names: Container[str]) -> dict[str, bytes] | None:
        """Read a revision's files; None where they seem damaged."""
        if revision.digest in self._damaged:
            raise RevisionDamaged(revision.name, revision.number)
        try:
            digest, _, found = read_files(self._storage.files(revision), names)
        except (StoreDamaged, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreUnreachable(
                f"The files of {revision.name}@{revision.number} cannot be read: {error.strerror}."
            ) from error
        return found if digest == revision.digest else None

    def _read_again(self, revision: Revision, names: Container[str]) -> dict[str, bytes]:
        """Read files that seem damaged once more, now that nothing changes them; from a bucket,
        fetch them again first. If they still differ, they are damaged."""
        with suppress(StoreDamaged):
            self._storage.refresh(revision)
            found = self._read(revision, names)
            if found is not None:
                return found
        with self._mutex:
            self._damaged.add(revision.digest)
        damaged = RevisionDamaged(revision.name, revision.number)
        log.error("%s Its digest is %s.", damaged, revision.digest)
        raise damaged

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._changes:
            late = self._storage.settle()
            if late:
                with self._mutex:
                    self._replay_all(late)
            yield

    def _recover(self) -> None:
        self._replay_all(self._storage.read())
        self._storage.keep_only({digest for digest, users in self._users.items() if users > 0})

    def _replay_all(self, events: Iterable[Event]) -> None:
        for event in events:
            try:
                self._replay(event)
            except (ValueError, KeyError, TypeError) as error:
                log.warning("The event %r cannot be understood and is skipped: %r", event, error)
        self._sorted = sorted(name for name in self._adapters if name in self)

    def _replay(self, event: Event) -> None:
        adapter = self._adapters.setdefault(str(event["name"]), _Adapter())
        match event["event"]:
            case "revision":
                self._enter(adapter, revision_from_json(event))
                self._forget(adapter, int(event["dropped"]))
            case "details":
                self._edit(adapter, details_from_json(event))
            case "delete":
                self._forget(adapter, len(adapter.reachable))
                adapter.details, adapter.edits = Details(), 0
                adapter.last_number = max(adapter.last_number, int(event.get("number", 0)))
