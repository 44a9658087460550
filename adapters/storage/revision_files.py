"""Reads the files of revisions, compares them with their digest, and knows which are damaged."""

import logging
import threading
from collections.abc import Container, Iterable
from contextlib import suppress

from infuse.adapters.errors import RevisionDamaged, StoreDamaged, StoreUnreachable
from infuse.adapters.storage.folder import read_files
from infuse.adapters.storage.revision import Revision
from infuse.adapters.storage.storage import Storage

log = logging.getLogger(__name__)


class RevisionFiles:
    """The files of the revisions that a storage has. Thread-safe."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._mutex = threading.Lock()
        """Guards the field below."""
        self._damaged: set[str] = set()
        """Digests of damaged contents, which are not read again until they are stored anew."""

    def read(self, revision: Revision, names: Container[str]) -> dict[str, bytes] | None:
        """Return the bytes of the named files that a revision has; None where its files seem
        damaged. Raises RevisionDamaged where it is known that they are, StoreUnreachable."""
        if self.is_damaged(revision):
            raise RevisionDamaged(revision.name, revision.number)
        try:
            digest, _, found = read_files(self._storage.files(revision), names)
        except (StoreDamaged, FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise StoreUnreachable(
                f"The files of {revision.name}@{revision.number} cannot be read: {error.strerror}."
            ) from error
        return found if digest == revision.digest else None

    def read_again(self, revision: Revision, names: Container[str]) -> dict[str, bytes]:
        """Read files that seem damaged once more, while nothing changes them; from a bucket, fetch
        them again first. If they still differ, they are damaged. Raises RevisionDamaged."""
        with suppress(StoreDamaged):
            self._storage.refresh(revision)
            found = self.read(revision, names)
            if found is not None:
                return found
        with self._mutex:
            self._damaged.add(revision.digest)
        damaged = RevisionDamaged(revision.name, revision.number)
        log.error("%s Its digest is %s.", damaged, revision.digest)
        raise damaged

    def is_damaged(self, revision: Revision) -> bool:
        return revision.digest in self._damaged

    @property
    def damaged(self) -> frozenset[str]:
        """The digests of the contents that are damaged."""
        with self._mutex:
            return frozenset(self._damaged)

    def forget(self, digests: Iterable[str]) -> None:
        """Note that contents were stored anew, or removed: they are damaged no longer."""
        with self._mutex:
            self._damaged.difference_update(digests)
