"""Bodies and uploads that are too large, and a disk that is full."""

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.services import Services
from infuse.server.settings import MEBIBYTE, Settings
from tests.api.archives import WEIGHTS, form_of, read_adapter, zip_of
from tests.api.conftest import run_server
from tests.api.oracle import upload
from tests.api.test_adapters import ADAPTERS, PROMPT, add_archive, complete
from tests.factories import tiny_tokenizer

MAX_UPLOAD, MAX_BODY = 200_000, 2_000
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def small(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Services]]:
    """A server with small limits."""
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=tmp_path_factory.mktemp("small"),
        max_upload_bytes=MAX_UPLOAD,
        max_body_bytes=MAX_BODY,
        source_prefixes="file:///",
    )
    with run_server(settings) as running:
        yield running


@pytest.fixture
def client(small: tuple[str, Services]) -> Iterator[httpx.Client]:
    """A client of the small server; it deletes what a test has added."""
    with httpx.Client(base_url=small[0], timeout=60) as client:
        yield client
        for adapter in client.get(ADAPTERS).json()["data"]:
            client.delete(f"{ADAPTERS}/{adapter['name']}")


@pytest.fixture
def files(adapter_folders: dict[str, Path]) -> dict[str, bytes]:
    return read_adapter(adapter_folders["mlp"])


def kept(services: Services) -> dict[str, bytes]:
    """Every file of the store."""
    folder = services.settings.adapters_dir
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "details"}
    return dict(error)


# Bodies


PART = b'--x\r\nContent-Disposition: form-data; name="archive"; filename="a"\r\n\r\n'
BODIES = {
    ADAPTERS: ("multipart/form-data; boundary=x", PART, MAX_UPLOAD + MEBIBYTE),
    COMPLETIONS: ("application/json", b'{"model": "tiny", "prompt": "', MAX_BODY),
}


def in_pieces(body: bytes) -> Iterator[bytes]:
    """A body that is sent without its length."""
    for start in range(0, len(body), 500):
        yield body[start : start + 500]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("declared", [True, False])
def test_a_body_over_its_limit_is_refused(client: httpx.Client, path: str, declared: bool) -> None:
    kind, start, limit = BODIES[path]
    body = start.ljust(limit + 1)

    response = client.post(
        path, content=body if declared else in_pieces(body), headers={"Content-Type": kind}
    )

    error = error_of(response, 413)
    assert (error["code"], error["type"]) == ("body_too_large", "invalid_request_error")
    assert str(limit) in error["message"]


def test_a_declared_length_is_enough_to_refuse(small: tuple[str, Services]) -> None:
    url = httpx.URL(small[0])
    head = f"POST {ADAPTERS} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**12}\r\n\r\n"

    with socket.create_connection((url.host, url.port or 80), timeout=60) as connection:
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_source_is_a_request_in_json_like_any_other(client: httpx.Client) -> None:
    body = b'{"source": "'.ljust(MAX_BODY + 1, b"a")

    response = client.post(ADAPTERS, content=body, headers={"Content-Type": "application/json"})

    assert str(MAX_BODY) in error_of(response, 413)["message"]


def test_a_body_of_just_its_limit_is_read(client: httpx.Client) -> None:
    body = httpx.Request("POST", "http://x", json=PROMPT | {"model": "tiny"}).read()

    response = client.post(
        COMPLETIONS, content=body.ljust(MAX_BODY), headers={"Content-Type": "application/json"}
    )

    assert response.status_code == 200


@pytest.mark.parametrize("packed", [False, True])
def test_files_over_the_limit_together_are_refused(
    client: httpx.Client, small: tuple[str, Services], files: dict[str, bytes], packed: bool
) -> None:
    before = kept(small[1])
    large = files | {WEIGHTS: files[WEIGHTS] + os.urandom(MAX_UPLOAD)}

    if packed:
        response = add_archive(client, "large", zip_of(large))
    else:
        response = client.post(ADAPTERS, data={"name": "large"}, files=form_of(large))

    error = error_of(response, 413)
    assert error["code"] == "upload_too_large"
    assert str(MAX_UPLOAD) in error["message"]
    assert kept(small[1]) == before


# A full disk


@contextlib.contextmanager
def no_room(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


@contextlib.contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """The system itself refuses to write beyond `size` bytes of any file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CHANGES: dict[str, Callable[[httpx.Client, dict[str, Path]], httpx.Response]] = {
    "POST": lambda client, folders: upload(client, "new", folders["mlp"]),
    "POST of known content": lambda client, folders: upload(client, "new", folders["queries"]),
    "PUT": lambda client, folders: upload(client, "old", folders["mlp"], method="PUT"),
    "DELETE": lambda client, _: client.delete(f"{ADAPTERS}/old"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_full_disk_is_said_and_changes_nothing(
    client: httpx.Client,
    small: tuple[str, Services],
    adapter_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[httpx.Client, dict[str, Path]], httpx.Response],
) -> None:
    upload(client, "old", adapter_folders["queries"])
    before, listed = kept(small[1]), client.get(ADAPTERS).json()

    with no_room(monkeypatch):
        response = change(client, adapter_folders)

    error = error_of(response, 507)
    assert (error["code"], error["type"]) == ("storage_full", "server_error")
    assert kept(small[1]) == before
    assert client.get(ADAPTERS).json() == listed
    assert complete(client, "old").status_code == 200
    assert change(client, adapter_folders).is_success


@pytest.mark.fault(
    "disk",
    "The disk fills while an upload arrives, or is unpacked",
    by="`RLIMIT_FSIZE`",
    promise="It is 507 `storage_full`, nothing of it stays, and the same upload is taken later.",
)
@pytest.mark.parametrize("size", [10_000, MEBIBYTE], ids=["staged", "received"])
def test_a_disk_that_fills_while_an_upload_comes_is_said(
    client: httpx.Client, small: tuple[str, Services], files: dict[str, bytes], size: int
) -> None:
    before = kept(small[1])
    readme = {"README.md": os.urandom(100_000), "not-needed": os.urandom(size)}
    packed = zip_of(files | readme)

    with files_end_at(2_000 if size < MEBIBYTE else 1_000_000):
        response = add_archive(client, "new", packed)

    assert error_of(response, 507)["code"] == "storage_full"
    assert kept(small[1]) == before
    assert add_archive(client, "new", packed).status_code == 201


@pytest.mark.fault(
    "disk",
    "The disk fills while an adapter is fetched",
    by="`RLIMIT_FSIZE`",
    promise="As where it is uploaded.",
)
def test_a_disk_that_fills_while_a_source_is_fetched_is_said(
    client: httpx.Client, small: tuple[str, Services], files: dict[str, bytes], tmp_path: Path
) -> None:
    before = kept(small[1])
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    tiny_tokenizer().save_pretrained(tmp_path)
    body = {"name": "new", "source": f"file://{tmp_path}"}

    with files_end_at(2_000):
        response = client.post(ADAPTERS, json=body)

    assert error_of(response, 507)["code"] == "storage_full"
    assert kept(small[1]) == before
    assert client.post(ADAPTERS, json=body).status_code == 201
