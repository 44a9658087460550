"""A store's storage in a folder on disk.

content/<digest>/   an adapter's files, shared by every revision with this content
journal.jsonl       every change of every adapter, one line each, by whom and when
staging/            uploads in progress, emptied at start
lock                held by the one process that owns the folder
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.errors import StoreFull, StoreLocked
from adapters.journal import Event, Journal, sync
from adapters.revision import Revision

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ContentFolder:
    """Owns `content/`, `staging/` and `lock`: no other process may write there.

    Raises StoreLocked where another process owns the folder, and StoreFull where the disk has no
    room.
    """

    def __init__(self, folder: Path) -> None:
        self._content = folder / "content"
        self._staging = folder / "staging"
        with room():
            self.make()
            self.lock = (folder / "lock").open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.lock.close()
            raise StoreLocked(f"another server uses the adapters folder {folder}") from None
        for leftover in self._staging.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()

    def make(self) -> None:
        for each in (self._content, self._staging):
            each.mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        self.lock.close()

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder to write files in; gone afterwards."""
        with room():
            folder = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            with room():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def keep(self, staged: Path, digest: str) -> None:
        """Move the staged files to where their digest says, durably."""
        target = self.path(digest)
        if not target.exists():
            with room():
                for file in staged.iterdir():
                    sync(file)
                sync(staged)
                staged.rename(target)
                sync(self._content)

    def path(self, digest: str) -> Path:
        return self._content / digest

    def remove(self, digests: Iterable[str]) -> None:
        for digest in digests:
            # Out of sight first: a half-removed folder must never pass for the content.
            doomed = self._staging / f"{digest}.removed"
            with suppress(OSError):
                self.path(digest).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove every other content."""
        self.remove([each.name for each in os.scandir(self._content) if each.name not in digests])


class FolderStorage(ContentFolder):
    """A `Storage` on this machine's disk."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        try:
            with room():
                self._journal = Journal(folder / "journal.jsonl")
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        self._journal.close()
        super().close()

    def read(self) -> list[Event]:
        return self._journal.read()

    def append(self, event: Mapping[str, object]) -> None:
        with room():
            self._journal.append(event)

    def settle(self) -> Sequence[Event]:
        """A failed append leaves nothing on a disk."""
        return ()

    def files(self, revision: Revision) -> Path:
        return self.path(revision.digest)


def digest_of(folder: Path) -> tuple[str, int]:
    """SHA-256 over the names and bytes of a folder's files, and how many bytes they have."""
    sha = hashlib.sha256()
    size = 0
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        sha.update(f"{path.name}\0{len(data)}\0".encode())
        sha.update(data)
        size += len(data)
    return sha.hexdigest(), size


@contextmanager
def room() -> Iterator[None]:
    """A disk without room is ours to name; every other failure of it is not."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StoreFull(
                "The disk that holds the adapters is full; delete adapters or make room."
            ) from error
        raise
