"""Servers that stop and start again on the same adapters, in a folder or in a bucket."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import obstore
import pytest
from obstore.store import from_url

from infuse.adapters.storage.objects import Objects
from infuse.server.settings import Settings
from tests.api.conftest import run_by_modules, run_server

ADAPTERS = "/v1/adapters"
COMPLETIONS = "/v1/completions"
ALL_USAGE = {"period": "month", "start": "2026-01-01"}
"""The parameters of /v1/usage, whose default is this month: one may begin while a test runs."""

Serve = Callable[..., AbstractContextManager[httpx.Client]]


class Place:
    """Where a server keeps its adapters."""

    def __init__(self, tmp_path: Path, bucket: str | None) -> None:
        self.folder = tmp_path / "adapters"
        self.cache = tmp_path / "cache"
        self.bucket = bucket
        self.settings: dict[str, Any] = {
            "adapters_dir": self.folder if bucket is None else bucket,
            "adapters_cache_dir": self.cache,
            "merges_dir": tmp_path / "merges",
            "usage_dir": tmp_path / "usage",
        }

    def change(self, file: str, change: Callable[[bytes], bytes]) -> None:
        """Change a file of every content, wherever it is kept, from outside."""
        for path in {*self.folder.rglob(file), *self.cache.rglob(file)}:
            path.write_bytes(change(path.read_bytes()))
        if self.bucket is not None:
            outside = from_url(self.bucket, client_options={"allow_http": True})
            with closing(Objects.at(self.bucket)) as objects:
                for key in objects.list("content"):
                    data = objects.get(key)
                    if key.endswith(file) and data is not None:
                        obstore.put(outside, key, change(data))


def flipped(data: bytes) -> bytes:
    """Flip two bits in two bytes near the end, where a weights file has numbers."""
    changed = bytearray(data)
    changed[-2] ^= 1
    changed[-7] ^= 64
    return bytes(changed)


@pytest.fixture(params=["on disk", "in a bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    in_bucket = request.param == "in a bucket"
    return Place(tmp_path, request.getfixturevalue("s3") if in_bucket else None)


@pytest.fixture
def serve(place: Place, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """A client of a server on the place; it stops with the block."""
    run_by_modules(monkeypatch)

    @contextmanager
    def serve(**more: Any) -> Iterator[httpx.Client]:
        settings = {"model": str(model_folder), "served_model_name": "tiny", "max_batch_rows": 4}
        server = run_server(Settings(**settings | place.settings | more))
        with server as (url, _), httpx.Client(base_url=url, timeout=60) as client:
            yield client

    return serve


def complete(client: httpx.Client, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "The order arrived", "max_tokens": 8, "ignore_eos": True}
    return client.post(COMPLETIONS, json=body | {"temperature": 0})


def text_of(client: httpx.Client, model: str) -> str:
    answer = complete(client, model)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() == {"message", "type", "param", "code", "details"}
    return error


def damaged_in_metrics(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    [value] = [line.split()[1] for line in lines if line.startswith("infuse_adapters_damaged ")]
    return float(value)
