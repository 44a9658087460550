"""A store as something else than its servers sees it: commands that read it, or make a new one."""

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from obstore.store import LocalStore

from infuse.adapters.errors import BackupRefused
from infuse.adapters.storage.bucket import places_of
from infuse.adapters.storage.bucket_journal import BucketJournal, segment_of
from infuse.adapters.storage.bucket_lease import Lease
from infuse.adapters.storage.chain import Event, follow
from infuse.adapters.storage.folder import ContentFolder
from infuse.adapters.storage.journal import sync
from infuse.adapters.storage.objects import Objects

JOURNAL = "journal.jsonl"


@dataclass(frozen=True, slots=True)
class Contents:
    objects: Objects
    place_of: Callable[[str], str]
    """Returns where the content of a digest is."""


class Outside(Protocol):
    """A store, or a backup of one, as objects."""

    objects: Objects

    def lines(self) -> list[bytes]:
        """Return all events as they were written."""
        ...

    def contents(self, events: Iterable[Event]) -> Contents:
        """Return where contents are, as the events say."""
        ...

    def refuse_journal(self) -> None:
        """Raises BackupRefused where there are events."""
        ...

    def owned(self) -> AbstractContextManager[object]:
        """Within: no server may start here. Raises StoreLocked where one runs."""
        ...

    def begin(self, lines: Sequence[bytes]) -> None:
        """Write the journal, whole and durably, after all contents."""
        ...


class OutsideFolder:
    """A store in a folder; or a backup, which looks the same in a bucket."""

    def __init__(self, objects: Objects, folder: Path | None = None) -> None:
        self.objects = objects
        self._folder = folder

    def lines(self) -> list[bytes]:
        journal = self.objects.get(JOURNAL)
        if journal is None:
            raise BackupRefused(f"There are no adapters in {self.objects.url}: check the path.")
        # A server may be writing a last line that is not whole yet.
        return journal.split(b"\n")[:-1]

    def contents(self, events: Iterable[Event]) -> Contents:  # noqa: ARG002
        return Contents(self.objects, lambda digest: f"content/{digest}")

    def refuse_journal(self) -> None:
        if self.objects.get(JOURNAL):
            raise _not_empty(self.objects)

    @contextmanager
    def owned(self) -> Iterator[None]:
        assert self._folder is not None
        with closing(ContentFolder(self._folder)):
            yield

    def begin(self, lines: Sequence[bytes]) -> None:
        assert self._folder is not None
        whole = self._folder / "staging" / JOURNAL
        whole.write_bytes(joined(lines))
        # The contents as well.
        os.sync()
        whole.rename(self._folder / JOURNAL)
        sync(self._folder)


class OutsideBucket:
    """A store in a bucket."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects

    def lines(self) -> list[bytes]:
        lines = BucketJournal(self.objects, "").lines()
        if not lines:
            raise BackupRefused(f"There are no adapters in {self.objects.url}: check the URL.")
        return lines

    def contents(self, events: Iterable[Event]) -> Contents:
        return Contents(self.objects, places_of(events).__getitem__)

    def refuse_journal(self) -> None:
        if self.objects.list("journal"):
            raise _not_empty(self.objects)

    @contextmanager
    def owned(self) -> Iterator[None]:
        lease = Lease(self.objects, f"infuse restore {uuid.uuid4().hex}", 30.0, 5.0)
        try:
            yield
        finally:
            lease.release()

    def begin(self, lines: Sequence[bytes]) -> None:
        if not lines:
            return
        key = segment_of(len(lines))
        self.objects.create(key, b"\n".join(lines))
        if self.objects.list("journal") != [key]:
            # The lease ran out while this process was stopped.
            raise _not_empty(self.objects)


def _not_empty(objects: Objects) -> BackupRefused:
    return BackupRefused(
        f"There is a store in {objects.url} already: restore to an empty folder or another prefix."
    )


def objects_at(place: Path | str, must_be: bool = False) -> Objects:
    if isinstance(place, str):
        return Objects.at(place)
    if must_be and not place.is_dir():
        raise BackupRefused(f"There is no folder {place}: check the path.")
    place.mkdir(parents=True, exist_ok=True)
    return Objects(LocalStore(place), str(place))


@contextmanager
def opened(store: Path | str, is_new: bool = False) -> Iterator[Outside]:
    with closing(objects_at(store, must_be=not is_new)) as objects:
        yield OutsideBucket(objects) if isinstance(store, str) else OutsideFolder(objects, store)


def events_of(lines: Iterable[bytes]) -> list[Event]:
    """Return the events that change an adapter. Damaged ones are skipped, as a server does."""
    events = (entry.event for entry in follow(lines))
    return [event for event in events if event is not None and "name" in event]


def joined(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
