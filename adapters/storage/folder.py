"""Storage of a store in a folder on disk.

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
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from infuse.adapters.errors import StoreFull, StoreLocked, StoreUnreachable
from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.journal import Journal, is_at, sync
from infuse.adapters.storage.replicas import Replicas
from infuse.adapters.storage.revision import Revision
from infuse.adapters.storage.storage import Kept

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL = "The disk that holds the adapters is full; delete adapters or make room."
_FAILS = "The disk that holds the adapters fails: {error}. Mend it, then send the change again."
_CHUNK = 1 << 20
"""How many bytes of a file are read at once."""


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
            self._own()
        except OSError:
            self.lock.close()
            raise StoreLocked(
                f"another server uses the adapters folder {folder}; each server needs its own, "
                "unless all of them share one (--shared-store)"
            ) from None

    def _own(self) -> None:
        """Raises OSError where another process owns the folder."""
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        with writing():
            self._staging.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._staging))
        try:
            with writing():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, staged: Path, digest: str) -> bool:
        """Move the staged files to the folder of their digest, durably. False where it has them
        already, unchanged."""
        target = self.path(digest)
        if target.exists():
            if self._is_whole(digest):
                return False
            self.remove([digest])
        with writing():
            for file in staged.iterdir():
                sync(file)
            sync(staged)
            staged.rename(target)
            sync(self._content)
        return True

    def _is_whole(self, digest: str) -> bool:
        try:
            return digest_of(self.path(digest))[0] == digest
        except OSError:
            return False

    def path(self, digest: str) -> Path:
        return self._content / digest

    def remove(self, digests: Iterable[str]) -> None:
        for digest in digests:
            # Renamed first: a partly removed folder must not be taken for the content.
            doomed = self._staging / f"{digest}.removed"
            with suppress(OSError):
                self._staging.mkdir(exist_ok=True)
                self.path(digest).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove every other content."""
        self.remove([each.name for each in os.scandir(self._content) if each.name not in digests])


class FolderStorage(ContentFolder):
    """A `Storage` on this machine's disk."""

    replicas: Replicas | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder
        self.is_read_only = False
        try:
            with room():
                self._journal = Journal(folder / "journal.jsonl")
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        self._journal.close()
        super().close()

    @property
    def last(self) -> int:
        return self._journal.last

    def read(self) -> list[Event]:
        return self._journal.read()

    def turn(self) -> AbstractContextManager[object]:
        return nullcontext()

    def check(self) -> None:
        """Raises StoreUnreachable where the folder is no longer the one that was opened."""
        lock, content = self._folder / "lock", self._content
        if not (is_at(self.lock, lock) and self._journal.is_in_place and content.is_dir()):
            raise StoreUnreachable(
                f"The adapters folder {self._folder} was removed, moved or replaced while the "
                "server runs, so no change would last: put it back as it was, or restart the "
                "server."
            )
        if os.statvfs(self._folder).f_flag & os.ST_RDONLY:
            self.is_read_only = True

    @contextmanager
    def staging(self) -> Iterator[Path]:
        self.check()
        with self._checked_on_failure(), super().staging() as folder:
            yield folder

    def keep(self, staged: Path, digest: str, in_use: bool) -> Kept:  # noqa: ARG002
        with self._checked_on_failure():
            return Kept(self.put(staged, digest), {})

    def append(self, event: Mapping[str, object]) -> None:
        with self._checked_on_failure(), writing():
            self._journal.append(event)

    def settle(self) -> Sequence[Event]:
        """Return nothing: an append that failed leaves no event on a disk."""
        self.check()
        return ()

    def forget(self, digests: Iterable[str]) -> None:
        """Do nothing: there are no copies."""

    def files(self, revision: Revision) -> Path:
        return self.path(revision.digest)

    def refresh(self, revision: Revision) -> None:
        """Do nothing: there is no other copy than the one on the disk."""

    @contextmanager
    def _checked_on_failure(self) -> Iterator[None]:
        """Where the disk fails, say so if the folder is no longer there, and note whether the disk
        is read-only: after an error of its own, ext4 says that to those who write alone."""
        try:
            yield
        except StoreUnreachable as error:
            cause = error.__cause__
            self.is_read_only = isinstance(cause, OSError) and cause.errno == errno.EROFS
            self.check()
            raise
        self.is_read_only = False


def digest_of(folder: Path) -> tuple[str, int]:
    """Return the SHA-256 over the names and bytes of a folder's files, and their size in bytes."""
    digest, size, _ = read_files(folder, ())
    return digest, size


def read_files(folder: Path, names: Container[str]) -> tuple[str, int, dict[str, bytes]]:
    """Return what `digest_of` does, and the bytes of the named files, read once for both."""
    sha = hashlib.sha256()
    size = 0
    kept = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            length = os.fstat(file.fileno()).st_size
            sha.update(f"{path.name}\0{length}\0".encode())
            if path.name in names:
                kept[path.name] = file.read()
                sha.update(kept[path.name])
            else:
                while chunk := file.read(_CHUNK):
                    sha.update(chunk)
        size += length
    return sha.hexdigest(), size, kept


@contextmanager
def room() -> Iterator[None]:
    """Raise StoreFull for a disk without room; other failures pass."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StoreFull(_FULL) from error
        raise


@contextmanager
def writing(full: str = _FULL, fails: str = _FAILS) -> Iterator[None]:
    """Raise StoreFull for a disk without room, and StoreUnreachable for one that fails; `full` and
    `fails` are their messages."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise StoreFull(full) from error
        raise StoreUnreachable(fails.format(error=error)) from error
