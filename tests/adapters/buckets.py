"""Open stores in buckets."""

from collections.abc import Callable
from pathlib import Path

from obstore.store import LocalStore

from infuse.adapters.storage.bucket import BucketStorage
from infuse.adapters.storage.objects import Objects
from infuse.adapters.storage.store import AdapterStore

OpenStore = Callable[..., AdapterStore]


def open_bucket(folder: Path, keep_revisions: int = 10) -> AdapterStore:
    """Open a store whose bucket is a folder, with its cache beside it."""
    objects = Objects(LocalStore(folder, automatic_cleanup=True, mkdir=True), f"file://{folder}")
    return AdapterStore(BucketStorage(objects, folder.with_name("cache")), keep_revisions)
