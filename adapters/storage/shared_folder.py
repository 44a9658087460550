"""Storage of a store in a folder that several servers share.

turn              held by the one server that changes something
replicas/         the servers, see replicas.py
staging/<id>/     what one server is staging
staging/<id>.lock held by that server; another one that starts removes what no server holds

What else is in the folder is as in folder.py. A server that does not share is kept out by `lock`.
"""

import fcntl
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from obstore.store import LocalStore

from infuse.adapters.errors import StoreUnreachable
from infuse.adapters.storage.chain import Event
from infuse.adapters.storage.folder import FolderStorage, writing
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.replicas import LEASE_SECONDS, Replicas

_PAUSE = 0.01
"""Seconds between two attempts to take a lock."""
_OPENING = 2.0
"""Seconds for which another server may hold `lock` while it opens the folder."""


class SharedFolderStorage(FolderStorage):
    """A `Storage` in a folder that other servers change too. They take turns, by a lock that ends
    with its process.

    Files must be the same for all servers at once: on one machine they are, and on a network file
    system that keeps locks and does not cache attributes (NFS with `noac`).
    """

    replicas: Replicas

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        """`lease_seconds`: see `Replicas`."""
        super().__init__(folder)
        self._seconds = lease_seconds
        self._turn = (folder / "turn").open("a+")
        self._objects = _InPlace(folder, self.check)
        self.replicas = Replicas(self._objects, lease_seconds)
        try:
            with self.turn():
                self._remove_abandoned()
                self._stage_apart()
        except BaseException:
            self._turn.close()
            super().close()
            raise

    def _own(self) -> None:
        # Alone, this server empties the staging folder.
        with suppress(BlockingIOError):
            super()._own()
        _lock(self.lock, fcntl.LOCK_SH, _OPENING)

    def _remove_abandoned(self) -> None:
        """Remove what servers were staging that were killed."""
        for path in self._staging.glob("*.lock"):
            with path.open("a") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
                path.unlink()

    def _stage_apart(self) -> None:
        self._staging = self._staging / uuid.uuid4().hex
        self._staging.mkdir()
        self._staging_lock = self._staging.with_suffix(".lock").open("a")
        fcntl.flock(self._staging_lock, fcntl.LOCK_EX)

    def close(self) -> None:
        with suppress(OSError):
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.with_suffix(".lock").unlink()
        self._staging_lock.close()
        self.replicas.leave()
        self._objects.close()
        self._turn.close()
        super().close()

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._locked(self._turn):
            yield

    def read(self) -> list[Event]:
        self.check()
        with self._checked_on_failure(), writing(), self._locked(self._journal.file):
            return self._journal.read()

    def settle(self) -> Sequence[Event]:
        return self.read()

    def append(self, event: Mapping[str, object]) -> None:
        with self._locked(self._journal.file):
            super().append(event)

    @contextmanager
    def _locked(self, file: IO[Any]) -> Iterator[None]:
        try:
            _lock(file, fcntl.LOCK_EX, self._seconds)
        except BlockingIOError:
            raise StoreUnreachable(
                f"Another server has been changing {self._folder} for more than "
                f"{self._seconds:g} seconds; try again."
            ) from None
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


class _InPlace(Objects):
    """The folder as objects, which does not make the folder again where it was removed."""

    def __init__(self, folder: Path, check: Callable[[], None]) -> None:
        super().__init__(LocalStore(folder), str(folder))
        self._check = check

    def put(self, key: str, data: bytes) -> None:
        self._check()
        super().put(key, data)


def _lock(file: IO[Any], how: int, seconds: float) -> None:
    """Take a lock. Raises BlockingIOError where others hold it for so many seconds."""
    until = time.monotonic() + seconds
    while True:
        try:
            return fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise
            time.sleep(_PAUSE)
