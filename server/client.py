"""A client of the admin API, for the command line."""

import tarfile
import tempfile
from pathlib import Path
from typing import IO, Any, Self
from urllib.parse import quote

import httpx

from infuse.adapters.checkpoint.adapter_files import folder_with_adapter, missing_files
from infuse.adapters.checkpoint.config import CONFIG_FILE, TEXT_FILES, WEIGHTS_FILE
from infuse.adapters.errors import Fault, InvalidAdapter

_TIMEOUT = 60.0


class ClientError(Exception):
    """The server refused, or could not be reached; the message is for the terminal."""


class AdminClient:
    """Calls the admin API of a running server. Every method raises ClientError."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def add(self, name: str, source: str) -> dict[str, Any]:
        """`source` is a folder, or a URL that the server fetches; also in `replace` and `check`."""
        return self._upload("POST", "/v1/adapters", source, {"name": name})

    def replace(self, name: str, source: str) -> dict[str, Any]:
        return self._upload("PUT", _path(name), source)

    def check(self, source: str) -> dict[str, Any]:
        return self._upload("POST", "/v1/adapters?dry_run=true", source)

    def adapters(self, page_size: int = 1000) -> list[dict[str, Any]]:
        adapters: list[dict[str, Any]] = []
        after = ""
        while True:
            query = {"limit": page_size} | ({"after": after} if after else {})
            page = self._send("GET", "/v1/adapters", params=query)
            adapters += page["data"]
            if page["next"] is None:
                return adapters
            after = page["next"]

    def combine(self, name: str, parts: list[dict[str, Any]], **recipe: Any) -> dict[str, Any]:
        body = {"name": name, "adapters": parts, **recipe}
        return self._send("POST", "/v1/adapters/combine", json=body)

    def revisions(self, name: str) -> list[dict[str, Any]]:
        return list(self._send("GET", f"{_path(name)}/revisions")["data"])

    def roll_back(self, name: str, revision: int) -> dict[str, Any]:
        return self._send("POST", f"{_path(name)}/rollback", json={"revision": revision})

    def remove(self, name: str) -> None:
        self._send("DELETE", _path(name))

    def _upload(
        self, method: str, path: str, source: str, data: dict[str, str] | None = None
    ) -> dict[str, Any]:
        if "://" in source:
            # The server has its own limit of time.
            body = {**(data or {}), "source": source}
            return self._send(method, path, json=body, timeout=None)
        with tempfile.TemporaryFile() as archive:
            try:
                files = _files_of(folder_with_adapter(Path(source)), archive)
            except InvalidAdapter as error:
                raise ClientError("\n".join(map(_line, error.faults))) from None
            except OSError as error:
                raise ClientError(
                    f"{error.filename}: {error.strerror}; name a folder that PEFT's "
                    "save_pretrained wrote"
                ) from None
            # The server has its own limits of time.
            return self._send(method, path, data=data, files=files, timeout=None)

    def _send(self, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            response = self._http.request(method, path, **content)
        except httpx.HTTPError as error:
            raise ClientError(
                f"no answer from {self._http.base_url}: {error}; is the server up? (--url)"
            ) from None
        if response.is_success:
            return {} if response.status_code == 204 else dict(response.json())
        try:
            error_info = response.json()["error"]
        except (ValueError, KeyError, TypeError):
            raise ClientError(f"the server answered {response.status_code}") from None
        lines = [error_info["message"]]
        lines += [
            f"  {_line(Fault(d['field'], d['problem'], d['fix']))}" for d in error_info["details"]
        ]
        raise ClientError("\n".join(lines))


def _line(fault: Fault) -> str:
    return f"{fault.field}: {fault.problem}" + (f" - {fault.fix}" if fault.fix else "")


def _path(name: str) -> str:
    """Return an adapter's path; a text that is no name leads to no other resource."""
    return f"/v1/adapters/{quote(name, safe='')}"


def _files_of(folder: Path, archive: IO[bytes]) -> dict[str, Any]:
    """The form's files: the two of every adapter, or an archive where it has its own texts.

    Raises InvalidAdapter where one of the two is missing.
    """
    if faults := missing_files({file.name for file in folder.iterdir() if file.is_file()}):
        raise InvalidAdapter(faults)
    texts = [name for name in TEXT_FILES if (folder / name).is_file()]
    if not texts:
        return {
            "config": (CONFIG_FILE, (folder / CONFIG_FILE).read_bytes()),
            "weights": (WEIGHTS_FILE, (folder / WEIGHTS_FILE).read_bytes()),
        }
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in (CONFIG_FILE, WEIGHTS_FILE, *texts):
            tar.add(folder / name, arcname=name)
    archive.seek(0)
    return {"archive": ("adapter.tar", archive)}
