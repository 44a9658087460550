"""A journal is a file of events, one JSON line each, that only grows and survives a crash."""

import errno
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

Event = dict[str, Any]


class Journal:
    """Owns the file. An event is durable when `append` returns, and whole or absent otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file = path.open("ab", buffering=0)
        self.last = 0
        """Where the last event that was read or appended ends, in bytes."""
        self._lines = 0
        sync(path.parent)

    def close(self) -> None:
        self.file.close()

    @property
    def is_in_place(self) -> bool:
        """Whether nobody removed, moved or replaced the file since it was opened."""
        return is_at(self.file, self._path)

    def read(self) -> list[Event]:
        """Return every event that was not returned before, oldest first.

        A last line that a crash cut off was never acknowledged, and is removed. A damaged line
        before it can only come from outside; it is skipped with a warning, so that all other
        adapters are served.
        """
        with self._path.open("rb") as file:
            file.seek(self.last)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._cut(self.last + whole)
        events = []
        for line in data[:whole].splitlines():
            self._lines += 1
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict):
                events.append(event)
            else:
                log.warning("Line %d of %s is damaged and skipped.", self._lines, self._path)
        self.last += whole
        return events

    def append(self, event: Mapping[str, object]) -> None:
        """Append an event. Raises OSError where the disk is full or fails, or the file is no longer
        in place; then nothing of the event is left."""
        size = os.fstat(self.file.fileno()).st_size
        line = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self.file.write(line[written:])
            os.fsync(self.file.fileno())
            if not self.is_in_place:
                # The next start would not find what was written into a removed file.
                raise FileNotFoundError(errno.ENOENT, "was removed or replaced", str(self._path))
        except OSError:
            self._cut(size)
            raise
        self.last = size + len(line)
        self._lines += 1

    def _cut(self, size: int) -> None:
        os.ftruncate(self.file.fileno(), size)
        os.fsync(self.file.fileno())


def is_at(file: IO[Any], path: Path) -> bool:
    """Whether an open file is still the one at a path: nobody removed, moved or replaced it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
