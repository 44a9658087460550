"""A journal is a file of events, one JSON line each, that only grows and survives a crash.

Each event has the digest of those before it: see chain.py.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from infuse.adapters.storage.chain import Event, chained_line, digest_of_line, follow, readable


class Journal:
    """Owns the file. An event is durable when `append` returns, and whole or absent otherwise."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.file = path.open("ab", buffering=0)
        self.last = 0
        """Where the last event that was read or appended ends, in bytes."""
        self._lines = 0
        self._digest = ""
        """Of all lines that were read or appended."""
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
        entries = list(follow(data[:whole].split(b"\n")[:-1], self._lines, self._digest))
        if entries:
            self._lines, self._digest = entries[-1].number, entries[-1].digest
        self.last += whole
        return readable(entries, str(self._path))

    def append(self, event: Mapping[str, object]) -> None:
        """Append an event. Raises OSError where the disk is full or fails, or the file is no longer
        in place; then nothing of the event is left."""
        size = os.fstat(self.file.fileno()).st_size
        line = chained_line(event, self._digest)
        data = line + b"\n"
        try:
            written = 0
            while written < len(data):
                written += self.file.write(data[written:])
            os.fsync(self.file.fileno())
            if not self.is_in_place:
                # The next start would not find what was written into a removed file.
                raise FileNotFoundError(errno.ENOENT, "was removed or replaced", str(self._path))
        except OSError:
            self._cut(size)
            raise
        self.last = size + len(data)
        self._lines += 1
        self._digest = digest_of_line(line)

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
