"""The index: which revisions and details each name has, as the events of a journal say."""

import logging
import threading
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from infuse.adapters.errors import UnknownAdapter, UnknownRevision
from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.revision import (
    Details,
    Revision,
    details_from_json,
    revision_from_json,
)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Adapter:
    """What is in memory for a name."""

    last_number: int = 0
    reachable: list[Revision] = field(default_factory=list)
    """Oldest first, since the name was last created; empty once it is deleted."""
    details: Details = field(default_factory=Details)
    edits: int = 0
    """How often the details were changed since the name was last created."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What events have changed."""

    before: dict[str, Revision | None]
    """The names, with their current revision before."""
    stored: set[str]
    """The contents that were stored."""
    dropped: set[str]
    """The contents that no reachable revision has any more."""


class Index:
    """Owns the names, and nothing on a disk. Thread-safe."""

    def __init__(self) -> None:
        self._mutex = threading.RLock()
        self._adapters: dict[str, _Adapter] = {}
        self._sorted: list[str] = []
        self._users: Counter[str] = Counter()
        """Digest -> how many reachable revisions have that content."""

    def apply(self, events: Iterable[Event]) -> Applied:
        """Take events in. Others see all of them, or none."""
        before: dict[str, Revision | None] = {}
        stored, dropped = set(), set()
        with self._mutex:
            for event in events:
                name = str(event.get("name"))
                before.setdefault(
                    name, self._adapters[name].reachable[-1] if name in self else None
                )
                stored.add(str(event.get("digest")))
                try:
                    dropped |= self._replay(event)
                except (ValueError, KeyError, TypeError, OverflowError) as error:
                    log.warning(
                        "The event %r cannot be understood and is skipped: %r", event, error
                    )
            self._sort(before)
            dropped = {digest for digest in dropped if self._users[digest] <= 0}
        return Applied(before, stored, dropped)

    def current(self, name: str) -> Revision:
        """Raises UnknownAdapter."""
        with self._mutex:
            return self._find(name).reachable[-1]

    def revisions(self, name: str) -> list[Revision]:
        """Return the reachable revisions, newest first. Raises UnknownAdapter."""
        with self._mutex:
            return self._find(name).reachable[::-1]

    def revision(self, name: str, number: int) -> Revision:
        """Raises UnknownAdapter, UnknownRevision."""
        for revision in self.revisions(name):
            if revision.number == number:
                return revision
        raise UnknownRevision(name, number)

    def details(self, name: str) -> Details:
        """Raises UnknownAdapter."""
        with self._mutex:
            return self._find(name).details

    def last_number(self, name: str) -> int:
        """Return the number of a name's last revision, also of a deleted name; 0 for a new one."""
        with self._mutex:
            return self._adapters.get(name, _Adapter()).last_number

    def count(self, name: str) -> int:
        """Return how many revisions of a name are reachable; 0 where there is no such name."""
        with self._mutex:
            return len(self._adapters.get(name, _Adapter()).reachable)

    def names(self, after: str | None = None, limit: int | None = None) -> list[str]:
        """Return names in order: at most `limit` of those after `after`."""
        with self._mutex:
            start = 0 if after is None else bisect_right(self._sorted, after)
            return self._sorted[start : None if limit is None else start + limit]

    def reachable(self, covers: Callable[[str], bool]) -> dict[str, list[Revision]]:
        """Return the reachable revisions, oldest first, of each name that `covers` is true for."""
        with self._mutex:
            return {
                name: self._adapters[name].reachable[:] for name in self._sorted if covers(name)
            }

    def users(self, digest: str) -> int:
        """Return how many reachable revisions have a content."""
        return self._users[digest]

    def digests(self) -> set[str]:
        """Return the contents of all reachable revisions."""
        with self._mutex:
            return {digest for digest, users in self._users.items() if users > 0}

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(self._adapters.get(name, _Adapter()).reachable)

    def _find(self, name: str) -> _Adapter:
        if name not in self:
            raise UnknownAdapter(name)
        return self._adapters[name]

    def _replay(self, event: Event) -> set[str]:
        """Take an event in; return the contents of the revisions that it drops."""
        adapter = self._adapters.setdefault(str(event["name"]), _Adapter())
        match event["event"]:
            case "revision":
                revision, dropped = revision_from_json(event), int(event["dropped"])
                adapter.last_number = revision.number
                adapter.reachable.append(replace(revision, edits=adapter.edits))
                self._users[revision.digest] += 1
                return self._forget(adapter, dropped)
            case "details":
                adapter.details = details_from_json(event)
                adapter.edits += 1
                if adapter.reachable:
                    adapter.reachable[-1] = replace(adapter.reachable[-1], edits=adapter.edits)
            case "drop":
                return self._forget(adapter, min(int(event["dropped"]), len(adapter.reachable) - 1))
            case "delete":
                adapter.details, adapter.edits = Details(), 0
                adapter.last_number = max(adapter.last_number, int(event.get("number", 0)))
                return self._forget(adapter, len(adapter.reachable))
        return set()

    def _forget(self, adapter: _Adapter, count: int) -> set[str]:
        """Drop the oldest `count` revisions of a name; return their contents."""
        gone = [revision.digest for revision in adapter.reachable[:count]]
        del adapter.reachable[:count]
        self._users.subtract(gone)
        return set(gone)

    def _sort(self, changed: Iterable[str]) -> None:
        """Put the names in order again. A single name goes to its place: a copy of all would take
        milliseconds for each change of thousands of names."""
        match list(changed):
            case [name]:
                place = bisect_left(self._sorted, name)
                if name in self._sorted[place : place + 1]:
                    del self._sorted[place]
                if name in self:
                    self._sorted.insert(place, name)
            case [_, *_]:
                self._sorted = sorted(name for name in self._adapters if name in self)
