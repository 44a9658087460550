"""Durable, content-addressed revisions of adapters in a folder on disk.

    content/<digest>/            an adapter's files, shared by every revision with this content
    names/<name>/<event>.json    the log of a name: one small file for each event, never changed
    staging/                     uploads in progress, emptied at start
    lock                         held by the one process that owns the folder

An event is either a revision or a deletion; the last one says what the name is. Content is made
durable first, then its event appears by one exclusive link: after a crash at any moment a name is
at its old or its new revision, whole, and what was acknowledged is there.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import threading
from bisect import bisect_right, insort
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from adapters.errors import (
    AdapterExists,
    Fault,
    InvalidAdapter,
    RevisionConflict,
    StoreFull,
    StoreLocked,
    UnknownAdapter,
    UnknownRevision,
)

log = logging.getLogger(__name__)

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What an OSError says when a disk is full."""


@dataclass(frozen=True, slots=True)
class Revision:
    """One state of an adapter. Numbers of a name are 1, 2, 3, … and are never used again."""

    name: str
    number: int
    digest: str
    """SHA-256 over the names and bytes of its files."""
    created: datetime
    size: int
    """Bytes of all files."""
    source: str

    @property
    def etag(self) -> str:
        """Of the content: a quoted string, as HTTP wants it."""
        return f'"{self.digest[:32]}"'


@dataclass(slots=True)
class _Log:
    """A name's history in memory."""

    events: int = 0
    last_number: int = 0
    reachable: list[Revision] = field(default_factory=list)
    """Since the name was last created; empty once it is deleted."""


def check_name(name: str) -> None:
    """Raises InvalidAdapter where `name` cannot be an adapter's."""
    if not re.fullmatch(NAME_PATTERN, name):
        shown = name if len(name) <= 140 else name[:137] + "..."
        problem = f"{shown!r} is no adapter name"
        fix = "1 to 128 letters, digits, dots, underscores and hyphens; the first a letter or digit"
        raise InvalidAdapter([Fault("name", problem, fix)])


class AdapterStore:
    """Owns the folder: no other process may write to it. Thread-safe.

    An operation is durable when it returns. Raises StoreLocked where another process owns the
    folder, and StoreFull where the disk has no room (nothing is left behind then).
    """

    def __init__(self, folder: Path) -> None:
        self._content = folder / "content"
        self._names = folder / "names"
        self._staging = folder / "staging"
        self._mutex = threading.RLock()
        with _room():
            for each in (self._content, self._names, self._staging):
                each.mkdir(parents=True, exist_ok=True)
            self._lock_file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise StoreLocked(f"another server uses the adapters folder {folder}") from None
        self._logs: dict[str, _Log] = {}
        self._sorted: list[str] = []
        self._recover()

    def close(self) -> None:
        self._lock_file.close()

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder to write an upload in; gone afterwards."""
        with _room():
            folder = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            with _room():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def create(self, name: str, staged: Path, source: str = "upload") -> Revision:
        """A new name with the files in `staged`. Raises AdapterExists, InvalidAdapter."""
        check_name(name)
        digest, size = _digest(staged)
        with self._mutex:
            if name in self:
                raise AdapterExists(name)
            return self._append_revision(name, staged, digest, size, source)

    def replace(
        self, name: str, staged: Path, if_match: str | None = None, source: str = "upload"
    ) -> tuple[Revision, bool]:
        """A new revision; (the current one, False) where the content is the same already.

        Raises UnknownAdapter, and RevisionConflict where `if_match` is not the current ETag.
        """
        digest, size = _digest(staged)
        with self._mutex:
            current = self._require(name, if_match)
            if current.digest == digest:
                return current, False
            return self._append_revision(name, staged, digest, size, source), True

    def delete(self, name: str, if_match: str | None = None) -> None:
        """The name is gone at once. Raises UnknownAdapter, RevisionConflict."""
        with self._mutex:
            self._require(name, if_match)
            history = self._logs[name]
            self._append(name, {"event": "delete", "number": history.last_number})
            digests = {revision.digest for revision in history.reachable}
            history.reachable = []
            self._sorted.remove(name)
            self._collect(digests)

    def current(self, name: str) -> Revision:
        with self._mutex:
            if name not in self:
                raise UnknownAdapter(name)
            return self._logs[name].reachable[-1]

    def revision(self, name: str, number: int) -> Revision:
        with self._mutex:
            self.current(name)
            for revision in self._logs[name].reachable:
                if revision.number == number:
                    return revision
            raise UnknownRevision(name, number)

    def names(self, after: str | None = None, limit: int | None = None) -> list[str]:
        """Sorted; the first `limit` that come after `after`."""
        with self._mutex:
            start = 0 if after is None else bisect_right(self._sorted, after)
            return self._sorted[start : None if limit is None else start + limit]

    def files(self, revision: Revision) -> Path:
        """The folder of a revision's files, to read only. It goes when the name is deleted."""
        return self._content / revision.digest

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._logs and bool(self._logs[name].reachable)

    def _require(self, name: str, if_match: str | None) -> Revision:
        current = self.current(name)
        if if_match is not None and if_match not in ("*", current.etag):
            raise RevisionConflict(name, current.etag)
        return current

    def _append_revision(
        self, name: str, staged: Path, digest: str, size: int, source: str
    ) -> Revision:
        """Content first, then its event: whoever sees the one finds the other."""
        history = self._logs.setdefault(name, _Log())
        number = history.last_number + 1
        revision = Revision(name, number, digest, datetime.now(UTC), size, source)
        try:
            with _room():
                self._keep(staged, self._content / digest)
            self._append(name, {"event": "revision", **_to_json(revision)})
        except BaseException:
            self._collect({digest})
            raise
        if not history.reachable:
            insort(self._sorted, name)
        history.last_number = number
        history.reachable.append(revision)
        return revision

    def _keep(self, staged: Path, target: Path) -> None:
        """Move the staged files to where their digest says, durably."""
        if not target.exists():
            for file in staged.iterdir():
                _sync(file)
            _sync(staged)
            staged.rename(target)
            _sync(self._content)

    def _append(self, name: str, event: dict[str, object]) -> None:
        """Make one event of a name visible and durable."""
        history = self._logs[name]
        folder = self._names / name
        with _room():
            if not folder.exists():
                folder.mkdir()
                _sync(self._names)
            descriptor, temporary = tempfile.mkstemp(dir=self._staging)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(event, file)
                    file.flush()
                    os.fsync(file.fileno())
                visible = folder / f"{history.events + 1:08}.json"
                os.link(temporary, visible)
                try:
                    _sync(folder)
                except OSError:
                    # Not durable, so not done: a restart must not find it without its content.
                    visible.unlink()
                    raise
                history.events += 1
            finally:
                os.unlink(temporary)

    def _collect(self, digests: set[str]) -> None:
        """Remove those contents that no reachable revision has."""
        used = {r.digest for history in self._logs.values() for r in history.reachable}
        for digest in digests - used:
            # Out of sight first: a half-removed folder must never pass for the content.
            doomed = self._staging / f"{digest}.removed"
            with suppress(OSError):
                (self._content / digest).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _recover(self) -> None:
        for leftover in self._staging.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()
        for folder in os.scandir(self._names):
            history = _read_log(Path(folder.path))
            self._logs[folder.name] = history
            if history.reachable:
                self._sorted.append(folder.name)
        self._sorted.sort()
        self._collect({entry.name for entry in os.scandir(self._content)})


def _read_log(folder: Path) -> _Log:
    """A damaged event can only come from outside (an event appears whole): it is passed over with
    a warning, so that one bad file takes neither the server nor the name's other revisions."""
    history = _Log()
    for path in sorted(folder.glob("[0-9]" * 8 + ".json")):
        history.events = int(path.stem)
        try:
            event = json.loads(path.read_text())
            number = int(event["number"])
            if event["event"] == "delete":
                history.reachable = []
            else:
                history.reachable.append(_from_json(folder.name, event))
            history.last_number = max(history.last_number, number)
        except (ValueError, KeyError, TypeError) as error:
            # It may have been a revision: no other one gets its number.
            history.last_number += 1
            log.warning("The event %s is damaged and passed over: %r", path, error)
    return history


def _to_json(revision: Revision) -> dict[str, object]:
    return {
        "number": revision.number,
        "digest": revision.digest,
        "created": revision.created.isoformat(),
        "size": revision.size,
        "source": revision.source,
    }


def _from_json(name: str, event: dict[str, object]) -> Revision:
    return Revision(
        name=name,
        number=int(str(event["number"])),
        digest=str(event["digest"]),
        created=datetime.fromisoformat(str(event["created"])),
        size=int(str(event["size"])),
        source=str(event["source"]),
    )


def _digest(folder: Path) -> tuple[str, int]:
    sha = hashlib.sha256()
    size = 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        sha.update(f"{path.name}\0{len(data)}\0".encode())
        sha.update(data)
        size += len(data)
    return sha.hexdigest(), size


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _room() -> Iterator[None]:
    """A disk without room is ours to name; every other failure of it is not."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StoreFull(
                "The disk that holds the adapters is full; delete adapters or make room."
            ) from error
        raise
