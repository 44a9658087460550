"""The client of a running server, for the command line."""

import json
import tarfile
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

import httpx2

from infuse.adapters.checkpoint.adapter_files import folder_with_adapter, missing_files
from infuse.adapters.checkpoint.config import CONFIG_FILE, FILES, README_FILE, WEIGHTS_FILE
from infuse.adapters.errors import Fault, InvalidAdapter

_TIMEOUT = 60.0
_UNLIMITED = httpx2.Timeout(None, connect=_TIMEOUT)
"""For what the server itself limits: uploads, fetches, answers."""
_PAGE = 1000
_CHUNK = 1 << 18
_EVENT = "data: "
_LAST_EVENT = "[DONE]"
Progress = Callable[[float], object]
"""Called with the share that is done, 0 to 1."""


class ClientError(Exception):
    """The server refused, or could not be reached; the message is for the terminal."""

    def __init__(self, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.code = code


class _Counted(httpx2.SyncByteStream):
    """The body of a request, which tells how much of it was sent."""

    def __init__(self, request: httpx2.Request, progress: Progress) -> None:
        assert isinstance(request.stream, httpx2.SyncByteStream)
        self._body = request.stream
        self._nbytes = int(request.headers["Content-Length"])
        self._progress = progress

    def __iter__(self) -> Iterator[bytes]:
        sent = 0
        for chunk in self._body:
            yield chunk
            sent += len(chunk)
            self._progress(sent / self._nbytes)


class Client:
    """Calls a running server. Every method raises ClientError."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx2.Client(base_url=url, headers=headers, timeout=_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # Adapters. `source` is a folder, or a URL that the server fetches.

    def add(self, name: str, source: str, progress: Progress = lambda _: None) -> dict[str, Any]:
        return self._upload("POST", "/v1/adapters", source, progress, {"name": name})

    def replace(
        self, name: str, source: str, progress: Progress = lambda _: None
    ) -> dict[str, Any]:
        return self._upload("PUT", _path(name), source, progress)

    def check(self, source: str, progress: Progress = lambda _: None) -> dict[str, Any]:
        return self._upload("POST", "/v1/adapters?dry_run=true", source, progress)

    def adapters(self, page_size: int = _PAGE) -> list[dict[str, Any]]:
        return self._listed("/v1/adapters", page_size)

    def adapter(self, name: str) -> dict[str, Any]:
        return self._send("GET", _path(name))

    def vectors(self, name: str) -> dict[str, Any]:
        """What the adapter does to each module, in numbers."""
        return self._send("GET", f"{_path(name)}/vectors")

    def describe(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        return self._send("PATCH", _path(name), json=changes)

    def combine(self, name: str, parts: list[dict[str, Any]], **recipe: Any) -> dict[str, Any]:
        body = {"name": name, "adapters": parts, **recipe}
        return self._send("POST", "/v1/adapters/combine", json=body)

    def revisions(self, name: str) -> list[dict[str, Any]]:
        return list(self._send("GET", f"{_path(name)}/revisions")["data"])

    def roll_back(self, name: str, revision: int) -> dict[str, Any]:
        return self._send("POST", f"{_path(name)}/rollback", json={"revision": revision})

    def remove(self, name: str) -> None:
        self._send("DELETE", _path(name))

    def download(self, name: str, folder: Path, progress: Progress) -> None:
        """Write the files of an adapter to a folder that is there."""
        etags = set()
        for file in FILES:
            with self._streamed("GET", f"{_path(name)}/files/{file}") as response:
                if response.status_code == 404 and file not in (CONFIG_FILE, WEIGHTS_FILE):
                    continue
                _check(response)
                etags.add(response.headers["ETag"])
                _write(response, folder / file, progress)
        if len(etags) > 1:
            raise ClientError(f"The adapter '{name}' has changed meanwhile; download it again")

    # Merges.

    def merges(self) -> list[dict[str, Any]]:
        return self._listed("/v1/merges", _PAGE)

    def merge(self, id: str) -> dict[str, Any]:
        return self._send("GET", f"/v1/merges/{quote(id, safe='')}")

    def cancel_merge(self, id: str) -> None:
        self._send("DELETE", f"/v1/merges/{quote(id, safe='')}")

    # Generation.

    def models(self) -> list[dict[str, Any]]:
        """The base model, then the adapters."""
        return list(self._send("GET", "/v1/models")["data"])

    def chat(self, body: dict[str, Any]) -> Generator[str]:
        """The texts of an answer, as they come."""
        with self._streamed("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            _check(answer)
            for line in answer.iter_lines():
                data = line.removeprefix(_EVENT)
                if not line.startswith(_EVENT) or data == _LAST_EVENT:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise _refusal(event["error"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def _upload(
        self,
        method: str,
        path: str,
        source: str,
        progress: Progress,
        data: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        if "://" in source:
            body = {**(data or {}), "source": source}
            return self._send(method, path, json=body, timeout=_UNLIMITED)
        with tempfile.TemporaryFile() as archive:
            try:
                files = _files_of(folder_with_adapter(Path(source)), archive)
            except InvalidAdapter as error:
                raise ClientError(_lines(error.faults), "invalid_adapter") from None
            except OSError as error:
                raise ClientError(
                    f"{error.filename}: {error.strerror}; name a folder that PEFT's "
                    "save_pretrained wrote"
                ) from None
            request = self._http.build_request(
                method, path, data=data, files=files, timeout=_UNLIMITED
            )
            request.stream = _Counted(request, progress)
            with self._answering():
                return _content(self._http.send(request))

    def _listed(self, path: str, page_size: int) -> list[dict[str, Any]]:
        """All pages of a list."""
        listed: list[dict[str, Any]] = []
        query: dict[str, Any] = {"limit": page_size}
        while True:
            page = self._send("GET", path, params=query)
            listed += page["data"]
            if page["next"] is None:
                return listed
            query["after"] = page["next"]

    def _send(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        with self._answering():
            return _content(self._http.request(method, path, **content))

    @contextmanager
    def _streamed(self, method: str, path: str, **content: Any) -> Iterator[httpx2.Response]:
        """An answer that is read as it comes."""
        with (
            self._answering(),
            self._http.stream(method, path, timeout=_UNLIMITED, **content) as response,
        ):
            yield response

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except httpx2.HTTPError as error:
            raise ClientError(
                f"no answer from {self._http.base_url}: {error}; is the server up? (--url)"
            ) from None


def _check(response: httpx2.Response) -> None:
    """Raises ClientError where the server refused."""
    if response.is_success:
        return
    response.read()
    try:
        refused = _refusal(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        refused = ClientError(f"the server answered {response.status_code}")
    raise refused


def _content(response: httpx2.Response) -> dict[str, Any]:
    _check(response)
    return {} if response.status_code == 204 else dict(response.json())


def _refusal(error: dict[str, Any]) -> ClientError:
    """The error of an answer. Faults stand alone: the message repeats the first one."""
    faults = [Fault(each["field"], each["problem"], each["fix"]) for each in error["details"]]
    return ClientError(_lines(faults) if faults else error["message"], error["code"])


def _lines(faults: Sequence[Fault]) -> str:
    """Each fault on a line, below their number where there are several."""
    lines = [
        f"{fault.field}: {fault.problem}" + (f" - {fault.fix}" if fault.fix else "")
        for fault in faults
    ]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} faults:", *lines])


def _path(name: str) -> str:
    """Return an adapter's path; a text that is no name leads to no other resource."""
    return f"/v1/adapters/{quote(name, safe='')}"


def _write(response: httpx2.Response, path: Path, progress: Progress) -> None:
    nbytes, written = int(response.headers["Content-Length"]), 0
    with path.open("wb") as file:
        for chunk in response.iter_bytes(_CHUNK):
            written += file.write(chunk)
            progress(written / nbytes)


def _files_of(folder: Path, archive: IO[bytes]) -> dict[str, Any]:
    """The form's files: the two of every adapter, or an archive where it has texts of its own or is
    signed.

    Raises InvalidAdapter where one of the two is missing.
    """
    if faults := missing_files({file.name for file in folder.iterdir() if file.is_file()}):
        raise InvalidAdapter(faults)
    found = [name for name in FILES if (folder / name).is_file()]
    if not {*found} - {CONFIG_FILE, WEIGHTS_FILE, README_FILE}:
        return {
            "config": (CONFIG_FILE, (folder / CONFIG_FILE).read_bytes()),
            "weights": (WEIGHTS_FILE, (folder / WEIGHTS_FILE).read_bytes()),
        }
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in found:
            tar.add(folder / name, arcname=name)
    archive.seek(0)
    return {"archive": ("adapter.tar", archive)}
