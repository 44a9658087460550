"""Fetch adapters from the hub, from a bucket, or from a folder of this machine."""

import os
import re
import stat
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from copy import copy
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Protocol

import anyio
import httpx2
import obstore
from anyio import to_thread
from huggingface_hub import constants, get_token, hf_hub_url
from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from infuse.adapters.checkpoint.adapter_files import PICKLED, PICKLED_FILE
from infuse.adapters.checkpoint.config import CONFIG_FILE, FILES, WEIGHTS_FILE
from infuse.adapters.errors import (
    InvalidAdapter,
    SourceFailed,
    SourceNotAllowed,
    SourceNotFound,
    SourceRefused,
    SourceTimeout,
    SourceTooLarge,
)
from infuse.adapters.sources.source_http import GuardedHttp
from infuse.adapters.sources.source_url import Source, parse_source

REQUIRED = (CONFIG_FILE, WEIGHTS_FILE)
_AT_ONCE = 4
"""How many fetches run at once; more wait."""
_CHUNK = 1 << 16
"""How many bytes of a file are read at once."""
_CREDENTIALS = {
    "hf": "HF_TOKEN",
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "GOOGLE_SERVICE_ACCOUNT",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
_STORES = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}

Chunks = AsyncIterator[bytes]


class _Place(Protocol):
    """The folder of an adapter, wherever it is. Raises SourceError."""

    def open(self, name: str) -> AbstractAsyncContextManager[Chunks | None]:
        """Open a file: its bytes as they come; None where there is no such file."""

    @property
    def origin(self) -> str:
        """The URL, with the commit or ETag that was fetched: a revision's origin."""


class Sources:
    """Fetches from what an operator has allowed. Credentials come from the environment."""

    def __init__(self, prefixes: Sequence[Source], max_bytes: int, timeout: float) -> None:
        """`max_bytes`: for all files of a fetch together. `timeout`: seconds, for a whole fetch."""
        self._prefixes = tuple(prefixes)
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._turns = anyio.CapacityLimiter(_AT_ONCE)

    def limited_to(self, prefixes: Sequence[Source] | None) -> "Sources":
        """These, but only what also one of `prefixes` allows. None: all. Fetches of both count
        together."""
        if prefixes is None:
            return self
        limited = copy(self)
        limited._prefixes = tuple(
            max(own, other, key=lambda each: len(each.path))
            for own, other in product(self._prefixes, prefixes)
            if own.holds(other) or other.holds(own)
        )
        return limited

    def check(self, url: str) -> Source:
        """Parse the URL of an adapter that may be fetched. Raises BadSource, SourceNotAllowed."""
        source = parse_source(url)
        if not any(prefix.holds(source) for prefix in self._prefixes):
            raise SourceNotAllowed
        return source

    async def fetch(
        self, url: str, folder: Path, take: Callable[[int], object] = lambda _: None
    ) -> str:
        """Write the adapter's files into `folder`, and return exactly where they came from.

        Raises BadSource, SourceNotAllowed, SourceNotFound, SourceRefused, SourceTooLarge,
        SourceTimeout, SourceFailed, and InvalidAdapter where all weights are pickled. The files
        are not checked here: the registry checks them like any upload. `take` is called with a
        number of bytes before they are written; what it raises ends the fetch.
        """
        source = self.check(url)
        try:
            with anyio.fail_after(self._timeout):
                async with self._turns, self._place(source) as place:
                    await self._take(place, source, folder, take)
                    return place.origin
        except TimeoutError:
            raise SourceTimeout(self._timeout) from None

    @asynccontextmanager
    async def _place(self, source: Source) -> AsyncIterator[_Place]:
        if source.scheme == "file":
            roots = [_path(each) for each in self._prefixes if each.scheme == "file"]
            yield _Folder(_path(source), [root.resolve() for root in roots])
            return
        tls = await to_thread.run_sync(httpx2.create_ssl_context)
        async with aclosing(GuardedHttp(tls)) as http:
            if source.scheme == "hf":
                yield _Hub(source, http)
            else:
                yield _Bucket(source, http, await sign(source, self._timeout))

    async def _take(
        self, place: _Place, source: Source, folder: Path, take: Callable[[int], object]
    ) -> None:
        left = self._max_bytes
        for name in FILES:
            async with place.open(name) as chunks:
                if chunks is None:
                    continue
                async with await anyio.open_file(folder / name, "xb") as file:
                    async for chunk in chunks:
                        left -= len(chunk)
                        if left < 0:
                            raise SourceTooLarge(self._max_bytes)
                        take(len(chunk))
                        await file.write(chunk)
        if not (folder / WEIGHTS_FILE).exists():
            async with place.open(PICKLED_FILE) as pickled:
                if pickled is not None:
                    raise InvalidAdapter([PICKLED])
            if not (folder / CONFIG_FILE).exists():
                raise SourceNotFound(str(source))


class _Folder:
    """A folder of this machine. Each file is opened first, and then its real path is checked, so
    that no symlink leads out of the allowed folders, not even one that changes meanwhile."""

    def __init__(self, path: Path, roots: Sequence[Path]) -> None:
        """`roots`: the allowed folders, with their symlinks resolved."""
        self._path = path
        self._roots = roots

    @property
    def origin(self) -> str:
        return f"file://{self._path}"

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Chunks | None]:
        try:
            file = await anyio.open_file(self._path / name, "rb", opener=_without_waiting)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        except OSError as error:
            raise SourceRefused(f"{name} cannot be read: {error.strerror}.") from None
        async with file:
            real = Path(os.readlink(f"/proc/self/fd/{file.wrapped.fileno()}"))
            if not any(real.is_relative_to(root) for root in self._roots):
                raise SourceNotAllowed
            if not stat.S_ISREG(os.fstat(file.wrapped.fileno()).st_mode):
                raise SourceRefused(f"{name} is no plain file.")
            yield _chunks(file)


def _without_waiting(path: str, flags: int) -> int:
    """Open a file, without blocking for a pipe that has no writer."""
    return os.open(path, flags | os.O_NONBLOCK)


async def _chunks(file: anyio.AsyncFile[bytes]) -> Chunks:
    while chunk := await file.read(_CHUNK):
        yield chunk


class _Hub:
    """A repository of the Hugging Face hub, or of the server with its protocol at `HF_ENDPOINT`.

    Large files come over plain HTTP, never Xet: its own client would connect to any address.
    """

    def __init__(self, source: Source, http: GuardedHttp) -> None:
        self._source = source if source.revision is not None else source.at("main")
        self._http = http
        self._endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
        token = get_token()
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}

    @property
    def origin(self) -> str:
        return str(self._source)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Chunks | None]:
        organisation, repository, *folders = self._source.path
        url = hf_hub_url(
            f"{organisation}/{repository}",
            name,
            subfolder="/".join(folders),
            revision=self._source.revision,
            endpoint=self._endpoint.rstrip("/"),
        )
        async with self._http.get(url, self._headers) as answer:
            commit = answer.first.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT, "")
            if re.fullmatch(r"[0-9a-f]{40}", commit):
                # All other files are taken from the same commit.
                self._source = self._source.at(commit)
            yield _body(answer.response, name, "hf")


class _Bucket:
    """A folder of a bucket. obstore only signs the URLs: its own client would follow a redirect to
    any address."""

    def __init__(self, source: Source, http: GuardedHttp, urls: Mapping[str, str]) -> None:
        """`urls`: each file's signed URL."""
        self._source = source
        self._http = http
        self._urls = urls
        self._etag = ""

    @property
    def origin(self) -> str:
        return f"{self._source}#{self._etag}" if self._etag else str(self._source)

    @asynccontextmanager
    async def open(self, name: str) -> AsyncIterator[Chunks | None]:
        async with self._http.get(self._urls[name], {}) as answer:
            chunks = _body(answer.response, name, self._source.scheme)
            etag = answer.response.headers.get("ETag", "").strip('"')
            if name == WEIGHTS_FILE and chunks and re.fullmatch(r"[\w./+=:-]{1,100}", etag):
                self._etag = etag
            yield chunks


async def sign(source: Source, seconds: float) -> dict[str, str]:
    """Return a signed URL for each file. Raises SourceRefused where no credentials work."""
    names = [*FILES, PICKLED_FILE]
    bucket, *folders = source.path
    paths = ["/".join([*folders, name]) for name in names]
    try:
        store = _STORES[source.scheme](bucket, retry_config={"max_retries": 0})
        lifetime = timedelta(seconds=seconds + 1)
        urls = await obstore.sign_async(store, "GET", paths, expires_in=lifetime)
    except (BaseError, ValueError):
        # The error's text may contain parts of a credential.
        needed = _CREDENTIALS[source.scheme]
        raise SourceRefused(
            f"This server has no credentials that work for {source.scheme}://: set {needed} in its "
            "environment."
        ) from None
    return dict(zip(names, urls, strict=True))


def _body(response: httpx2.Response, name: str, scheme: str) -> Chunks | None:
    if response.status_code == 200:
        return response.aiter_raw()
    refused = response.status_code in (401, 403)
    # A bucket whose listing is not allowed answers 403 for a missing file.
    if response.status_code == 404 or (refused and name not in REQUIRED):
        return None
    if refused:
        raise SourceRefused(
            f"The source answers {response.status_code} for {name}: the file is not there, or this "
            f"server may not read it; check the name, and {_CREDENTIALS[scheme]} of the server."
        )
    raise SourceFailed(f"the source answers {response.status_code} for {name}")


def _path(source: Source) -> Path:
    return Path("/", *source.path)
