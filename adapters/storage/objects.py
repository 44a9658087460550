"""Read and write the objects under a URL (s3://, gs://, az://); failures raise our errors."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotFoundError
from obstore.store import from_url

from infuse.adapters.errors import StoreFull, StoreUnreachable

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_AT_ONCE = 16
"""How many requests run at once."""
_PART = 1 << 20
"""How many bytes of an object are in memory while it is written to a file."""
_NO_ROOM = ("507 Insufficient", "StorageFull", "QuotaExceeded", "No space left")
_ABSENT = (FileNotFoundError, NotFoundError)


class Objects:
    """The objects under a URL. Each is whole or absent. Thread-safe.

    Every method raises StoreFull where the bucket says that it has no room, and StoreUnreachable
    for every other failure: then a write may have happened, or may still happen.
    """

    def __init__(self, store: "ObjectStore", url: str) -> None:
        """`url`: shown in errors."""
        self._store = store
        self.url = url
        self._pool = ThreadPoolExecutor(_AT_ONCE, "bucket")

    @classmethod
    def at(cls, url: str, patience: float = 10.0) -> "Objects":
        """Open the objects at a URL. Credentials and endpoint come from the environment variables
        that each cloud's own tools read.

        `patience`: seconds without an answer after which a request has failed.
        """
        wait = timedelta(seconds=patience)
        with _failures_of(url):
            store = from_url(
                url,
                # HTTP without TLS is used only where the endpoint's URL says http.
                client_options={"allow_http": True, "connect_timeout": wait, "read_timeout": wait},
                retry_config={"max_retries": 3, "retry_timeout": 2 * wait},
            )
        return cls(store, url)

    def close(self) -> None:
        self._pool.shutdown()

    def create(self, key: str, data: bytes) -> bool:
        """Create an object; False where it exists. Of all callers, at most one gets True.

        Even a single caller may get False, where a first attempt succeeded and its answer was lost.
        """
        with _failures_of(self.url):
            try:
                obstore.put(self._store, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
        return True

    def put(self, key: str, data: bytes) -> None:
        """Write an object, over the one that there may be."""
        with _failures_of(self.url):
            obstore.put(self._store, key, data, use_multipart=False)

    def put_all(self, files: Mapping[str, Path]) -> None:
        with _failures_of(self.url):
            for _ in self._pool.map(self._put, files, files.values()):
                pass

    def get_all(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the bytes of each object, None for one that does not exist."""
        with _failures_of(self.url):
            return list(self._pool.map(self._get, keys))

    def fetch_all(self, files: Mapping[str, Path]) -> None:
        """Write the object of each key to its path, a part at a time. A missing object leaves no
        file."""
        with _failures_of(self.url):
            for _ in self._pool.map(self._fetch, files, files.values()):
                pass

    def get(self, key: str) -> bytes | None:
        return self.get_all([key])[0]

    def list(self, prefix: str) -> "list[str]":
        """Return the keys under a prefix, which is a folder's path."""
        with _failures_of(self.url):
            return [each["path"] for each in obstore.list(self._store, prefix).collect()]

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, whether they exist or not."""
        gone = list(keys)
        with _failures_of(self.url), suppress(*_ABSENT):
            if gone:
                obstore.delete(self._store, gone)

    def _put(self, key: str, path: Path) -> None:
        obstore.put(self._store, key, path)

    def _fetch(self, key: str, path: Path) -> None:
        try:
            chunks = obstore.get(self._store, key).stream(_PART)
        except _ABSENT:
            return
        with path.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)

    def _get(self, key: str) -> bytes | None:
        try:
            return obstore.get(self._store, key).bytes().to_bytes()
        except _ABSENT:
            return None


@contextmanager
def _failures_of(url: str) -> Iterator[None]:
    try:
        yield
    except (BaseError, *_ABSENT, NotImplementedError) as error:
        reason = str(error).partition("\n")[0][:300]
        if any(sign in str(error) for sign in _NO_ROOM):
            raise StoreFull(f"The bucket {url} is full; delete adapters or make room.") from error
        raise StoreUnreachable(f"The bucket {url} cannot be used: {reason}") from error
