"""Durable, content-addressed revisions of adapters, in a folder on disk or in a bucket.

The journal says what each name is. Content is made durable first, then its event is appended: after
a crash at any moment a name is at its old or its new revision, whole, and what was acknowledged is
there. Start-up reads the journal, whatever the number of adapters.
"""

import logging
import re
import threading
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from adapters.errors import (
    AdapterExists,
    Fault,
    InvalidAdapter,
    RevisionConflict,
    UnknownAdapter,
    UnknownRevision,
)
from adapters.folder import FolderStorage, digest_of
from adapters.journal import Event
from adapters.revision import (
    Details,
    Origin,
    Revision,
    details_from_json,
    revision_from_json,
    revision_to_json,
)
from adapters.storage import Storage

log = logging.getLogger(__name__)

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
UPLOADED = Origin()


@dataclass(slots=True)
class _Adapter:
    """A name in memory."""

    last_number: int = 0
    reachable: list[Revision] = field(default_factory=list)
    """Oldest first, since the name was last created; empty once it is deleted."""
    details: Details = field(default_factory=Details)


def check_name(name: str) -> None:
    """Raises InvalidAdapter where `name` cannot be an adapter's."""
    if not re.fullmatch(NAME_PATTERN, name):
        shown = name if len(name) <= 140 else name[:137] + "..."
        problem = f"{shown!r} is no adapter name"
        fix = "1 to 128 letters, digits, dots, underscores and hyphens; the first a letter or digit"
        raise InvalidAdapter([Fault("name", problem, fix)])


class AdapterStore:
    """Owns its storage: no other process may write there. Thread-safe.

    An operation is durable when it returns, and one that raises has left nothing behind; only where
    a bucket was not reached may the change be found made later. Raises StoreLocked where another
    process owns the storage, StoreFull where it has no room, StoreUnreachable where it is away.
    """

    def __init__(self, storage: Path | Storage, keep_revisions: int = 10) -> None:
        """`keep_revisions`: how many of a name stay reachable; older contents are removed."""
        assert keep_revisions > 0
        self._keep_revisions = keep_revisions
        self._storage = FolderStorage(storage) if isinstance(storage, Path) else storage
        self._changes = threading.Lock()
        """Held through a change, also while it waits for the storage."""
        self._mutex = threading.RLock()
        """Guards what follows, and is never held while something waits."""
        self._adapters: dict[str, _Adapter] = {}
        self._sorted: list[str] = []
        self._users: Counter[str] = Counter()
        """Digest -> how many reachable revisions have that content."""
        try:
            self._recover()
        except BaseException:
            self._storage.close()
            raise

    def close(self) -> None:
        self._storage.close()

    def staging(self) -> AbstractContextManager[Path]:
        """A private folder to write an upload in; gone afterwards."""
        return self._storage.staging()

    def create(self, name: str, staged: Path, origin: Origin = UPLOADED) -> Revision:
        """A new name with the files in `staged`. Raises AdapterExists, InvalidAdapter."""
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
        """A new revision; (the current one, False) where the content is the same already.

        Raises UnknownAdapter, and RevisionConflict where `if_match` is not the current ETag.
        """
        digest, size = digest_of(staged)
        with self._changing():
            current = self._require(name, if_match)
            if current.digest == digest:
                return current, False
            return self._add_revision(name, staged, digest, size, origin), True

    def roll_back(
        self, name: str, number: int, if_match: str | None = None, by: str | None = None
    ) -> tuple[Revision, bool]:
        """A new revision with the content of `number`; (the current one, False) where it has that.

        Raises UnknownAdapter, UnknownRevision, RevisionConflict.
        """
        with self._changing():
            current = self._require(name, if_match)
            wanted = self.revision(name, number)
            if wanted.digest == current.digest:
                return current, False
            origin = replace(wanted.origin, source=f"rollback to {number}", by=by)
            return self._add_revision(name, None, wanted.digest, wanted.size, origin), True

    def describe(
        self, name: str, details: Details, if_match: str | None = None, by: str | None = None
    ) -> None:
        """Set what is said of a name. Raises UnknownAdapter, RevisionConflict."""
        with self._changing():
            self._require(name, if_match)
            adapter = self._adapters[name]
            if details != adapter.details:
                self._append("details", name, by, asdict(details))
                with self._mutex:
                    adapter.details = details

    def delete(self, name: str, if_match: str | None = None, by: str | None = None) -> None:
        """The name is gone at once. Raises UnknownAdapter, RevisionConflict."""
        with self._changing():
            self._require(name, if_match)
            adapter = self._adapters[name]
            self._append("delete", name, by, {"number": adapter.last_number})
            with self._mutex:
                gone = self._forget(adapter, len(adapter.reachable))
                adapter.details = Details()
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
        """Those that can be asked for, newest first. Raises UnknownAdapter."""
        with self._mutex:
            return self._find(name).reachable[::-1]

    def details(self, name: str) -> Details:
        """Raises UnknownAdapter."""
        with self._mutex:
            return self._find(name).details

    def names(self, after: str | None = None, limit: int | None = None) -> list[str]:
        """Sorted; the first `limit` that come after `after`."""
        with self._mutex:
            start = 0 if after is None else bisect_right(self._sorted, after)
            return self._sorted[start : None if limit is None else start + limit]

    def files(self, revision: Revision) -> Path:
        """The folder of a revision's files, to read only. It goes with the last such revision.

        Raises StoreUnreachable, StoreDamaged where they are in a bucket and not here yet.
        """
        return self._storage.files(revision)

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
        """Content first, then its event: whoever sees the one finds the other."""
        adapter = self._adapters.get(name, _Adapter())
        revision = Revision(name, adapter.last_number + 1, digest, datetime.now(UTC), size, origin)
        dropped = max(0, len(adapter.reachable) + 1 - self._keep_revisions)
        try:
            if staged is not None:
                self._storage.keep(staged, digest)
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
        self._collect(gone)
        return revision

    def _enter(self, adapter: _Adapter, revision: Revision) -> None:
        adapter.last_number = revision.number
        adapter.reachable.append(revision)
        self._users[revision.digest] += 1

    def _forget(self, adapter: _Adapter, count: int) -> list[str]:
        """Drop the oldest revisions of a name; returns their digests."""
        gone = [revision.digest for revision in adapter.reachable[:count]]
        del adapter.reachable[:count]
        self._users.subtract(gone)
        return gone

    def _append(self, event: str, name: str, by: str | None, values: Mapping[str, object]) -> None:
        now = datetime.now(UTC).isoformat()
        self._storage.append({"time": now, "event": event, "name": name, "by": by, **values})

    def _collect(self, digests: Iterable[str]) -> None:
        """Remove those contents that no reachable revision has."""
        self._storage.remove([digest for digest in digests if self._users[digest] <= 0])

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
                log.warning(
                    "The event %r cannot be understood and is passed over: %r", event, error
                )
        self._sorted = sorted(name for name in self._adapters if name in self)

    def _replay(self, event: Event) -> None:
        adapter = self._adapters.setdefault(str(event["name"]), _Adapter())
        match event["event"]:
            case "revision":
                self._enter(adapter, revision_from_json(event))
                self._forget(adapter, int(event["dropped"]))
            case "details":
                adapter.details = details_from_json(event)
            case "delete":
                self._forget(adapter, len(adapter.reachable))
                adapter.details = Details()
