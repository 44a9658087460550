"""Several stores in one process, each as a server of its own has it, on one storage."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from obstore.store import LocalStore

from infuse.adapters.errors import StoreUnreachable
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.shared_bucket import SharedBucketStorage
from infuse.adapters.storage.shared_folder import SharedFolderStorage
from infuse.adapters.storage.storage import Storage
from infuse.adapters.storage.store import AdapterStore

LEASE = 30.0
"""Longer than a machine with much to do may hold a server up."""
SHORT = 2.0
"""For a server that others wait for because it is away."""
PAUSE = 0.04

_CACHES = itertools.count()


class CutOff(Objects):
    """A bucket that can be away for one server."""

    is_away = False

    def _reach(self) -> None:
        if self.is_away:
            raise StoreUnreachable("the bucket is away")

    def create(self, key: str, data: bytes) -> bool:
        self._reach()
        return super().create(key, data)

    def put(self, key: str, data: bytes) -> None:
        self._reach()
        super().put(key, data)

    def put_all(self, files: Mapping[str, Path]) -> None:
        self._reach()
        super().put_all(files)

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        self._reach()
        return super().get_all(keys)

    def fetch_all(self, files: Mapping[str, Path]) -> None:
        self._reach()
        super().fetch_all(files)

    def list(self, prefix: str) -> "list[str]":
        self._reach()
        return super().list(prefix)

    def delete(self, keys: Iterable[str]) -> None:
        self._reach()
        super().delete(keys)


def bucket_in(folder: Path) -> CutOff:
    """A bucket that is a folder."""
    return CutOff(LocalStore(folder, automatic_cleanup=True, mkdir=True), f"file://{folder}")


def own_cache(folder: Path) -> Path:
    return folder.with_name(f"cache{next(_CACHES)}")


def shared_bucket(
    folder: Path, objects: Objects | None = None, lease_seconds: float = LEASE
) -> Storage:
    return shared_objects(objects or bucket_in(folder), own_cache(folder), lease_seconds)


def shared_objects(objects: Objects, cache: Path, lease_seconds: float = LEASE) -> Storage:
    storage = SharedBucketStorage(objects, objects, cache, lease_seconds)
    storage.replicas.pause = PAUSE
    return storage


def shared_folder(folder: Path, lease_seconds: float = LEASE) -> Storage:
    storage = SharedFolderStorage(folder, lease_seconds)
    storage.replicas.pause = PAUSE
    return storage


STORAGES: dict[str, Callable[[Path], Storage]] = {
    "a folder": shared_folder,
    "a bucket": shared_bucket,
}


def replica(storage: str, folder: Path, keep_revisions: int = 10) -> AdapterStore:
    return AdapterStore(STORAGES[storage](folder), keep_revisions)
