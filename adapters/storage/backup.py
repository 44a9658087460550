"""Backups of a store, in a folder or in a bucket, and stores that are made from them again.

    content/<digest>/<file>   the contents of all revisions that were reachable at one moment
    journal.jsonl             every event up to that moment
    backup.json               what the journal must be; written last, so a backup without it is none

A content never changes, so the beginning of a journal, with the contents of the revisions that are
reachable by it, is the store at one moment. Servers may remove a content before it is copied. Then
the journal is read again: it has gone on to a moment at which nothing has that content.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from infuse.adapters.errors import BackupRefused, StoreDamaged
from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.folder import digest_of
from infuse.adapters.storage.index import Index
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.outside import (
    JOURNAL,
    Contents,
    Outside,
    OutsideFolder,
    events_of,
    joined,
    objects_at,
    opened,
)

_FORMAT = 1
_MANIFEST = "backup.json"
_AT_ONCE = 8
"""How many contents are copied at once."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds."""

    adapters: int
    events: int
    damaged: Sequence[str]
    """The revisions, as name@number, whose contents were damaged in the store and are left out."""


def back_up(store: Path | str, backup: Path | str) -> Backup:
    """Copy a store, which servers may use and change meanwhile, to an empty folder or bucket.

    Raises BackupRefused where there is no store, or something at the destination.
    """
    with opened(store) as source, closing(objects_at(backup)) as objects:
        target = OutsideFolder(objects)
        if objects.list(""):
            raise BackupRefused(
                f"There is something at {objects.url} already: give an empty folder or another "
                "prefix, or remove what is there; a backup without backup.json was interrupted."
            )
        lines, index, damaged = _copy_moment(source, target)
        journal = joined(lines)
        objects.put(JOURNAL, journal)
        manifest = {
            "format": _FORMAT,
            "made": datetime.now(UTC).isoformat(),
            "events": len(lines),
            "journal": hashlib.sha256(journal).hexdigest(),
            "damaged": sorted(damaged),
        }
        _make_durable(backup)
        objects.put(_MANIFEST, json.dumps(manifest, indent=2).encode())
        _make_durable(backup)
    return _described(lines, index, damaged)


def restore(backup: Path | str, store: Path | str) -> Backup:
    """Make a store of a backup, in a folder or bucket without adapters. Until this returns, a
    server that starts there is refused; where it was interrupted, one finds no adapters.

    Raises BackupRefused where there is no backup, or a store at the destination, and StoreDamaged
    where the backup is not as it was written; then nothing was written.
    """
    with closing(objects_at(backup, must_be=True)) as objects, opened(store, True) as target:
        source = OutsideFolder(objects)
        lines, index, damaged = _read_backup(source)
        target.refuse_journal()
        digests, contents = index.digests() - damaged, source.contents(())
        if broken := _copy(digests, contents):
            names = ", ".join(_revisions(index, broken))
            raise StoreDamaged(
                f"The backup {objects.url} is damaged: the files of {names} are not those that "
                "were stored. Nothing was restored: use another backup."
            )
        with target.owned():
            target.refuse_journal()
            if _copy(digests, contents, target.contents(events_of(lines))):
                raise StoreDamaged(f"The backup {objects.url} was changed while it was restored.")
            target.begin(lines)
    return _described(lines, index, damaged)


def _copy_moment(source: Outside, target: OutsideFolder) -> tuple[list[bytes], Index, set[str]]:
    """Copy the contents of one moment; return its events, and the contents that are damaged."""
    copied: set[str] = set()
    failed: dict[str, int] = {}
    """Content -> the number of its last event when it was not whole."""
    while True:
        lines = source.lines()
        events = events_of(lines)
        index, stored = Index(), _last_stored(events)
        index.apply(events)
        # Nothing stored these anew, so they were needed all the time.
        damaged = {each for each, number in failed.items() if stored[each] == number}
        damaged &= index.digests()
        missing = index.digests() - copied - damaged
        gone = _copy(missing, source.contents(events), target.contents(events))
        copied |= missing - gone
        failed |= {digest: stored[digest] for digest in gone}
        if not gone:
            _delete_others(target, index.digests() - damaged)
            return lines, index, damaged


def _last_stored(events: Sequence[Event]) -> dict[str, int]:
    return {str(each["digest"]): n for n, each in enumerate(events) if "digest" in each}


def _delete_others(target: OutsideFolder, digests: Collection[str]) -> None:
    """Delete contents that were copied, and that no revision has any more."""
    found = target.objects.list("content")
    target.objects.delete(key for key in found if key.split("/")[1] not in digests)


def _copy(digests: Collection[str], source: Contents, target: Contents | None = None) -> set[str]:
    """Copy contents, or only look at them; return those that are not whole."""

    def is_whole(digest: str) -> bool:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            keys = source.objects.list(source.place_of(digest))
            source.objects.fetch_all({key: folder / key.rpartition("/")[2] for key in keys})
            if digest_of(folder)[0] != digest:
                return False
            if target is not None:
                place = target.place_of(digest)
                files = {f"{place}/{file.name}": file for file in folder.iterdir()}
                target.objects.put_all(files)
        return True

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        whole = zip(digests, threads.map(is_whole, digests), strict=True)
        return {digest for digest, is_it in whole if not is_it}


def _read_backup(source: OutsideFolder) -> tuple[list[bytes], Index, set[str]]:
    """Return the events of a backup, and the contents that it leaves out."""
    manifest = _manifest(source.objects)
    lines = source.lines()
    if hashlib.sha256(joined(lines)).hexdigest() != manifest["journal"]:
        raise StoreDamaged(
            f"The backup {source.objects.url} is damaged: {JOURNAL} is not as it was written. "
            "Nothing was restored: use another backup."
        )
    index = Index()
    index.apply(events_of(lines))
    return lines, index, set(manifest["damaged"])


def _manifest(objects: Objects) -> Mapping[str, Any]:
    text = objects.get(_MANIFEST)
    if text is None:
        raise BackupRefused(
            f"There is no whole backup in {objects.url}: it has no {_MANIFEST}. Check the path; "
            "where a backup was interrupted, make it again."
        )
    try:
        manifest: dict[str, Any] = json.loads(text)
        if manifest["format"] == _FORMAT and manifest.keys() >= {"journal", "damaged"}:
            return manifest
    except (ValueError, KeyError, TypeError):
        pass
    raise StoreDamaged(
        f"The backup {objects.url} cannot be read: {_MANIFEST} is damaged, or a newer release of "
        "Infuse has written it."
    )


def _described(lines: Sequence[bytes], index: Index, damaged: Collection[str]) -> Backup:
    return Backup(len(index), len(lines), _revisions(index, damaged))


def _revisions(index: Index, digests: Collection[str]) -> list[str]:
    return [
        f"{each.name}@{each.number}"
        for name in index.names()
        for each in index.revisions(name)
        if each.digest in digests
    ]


def _make_durable(place: Path | str) -> None:
    if isinstance(place, Path):
        os.sync()
