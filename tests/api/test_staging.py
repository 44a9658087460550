"""Uploads' staging folders, and the threads that uploads wait for."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from infuse.adapters.checkpoint.config import CONFIG_FILE, WEIGHTS_FILE
from infuse.adapters.errors import AdapterExists
from infuse.server.api.forms import Form
from infuse.server.api.staging import staged_upload
from infuse.server.caller import Caller
from infuse.server.services import Services
from tests.api.oracle import upload
from tests.api.test_health import MANY, StartServer
from tests.api.test_health import gate as gate
from tests.api.test_streaming import eventually

ADAPTERS = "/v1/adapters"


async def staged_until(services: Services, error: BaseException) -> Path:
    """The folder of an upload that ends with this error."""
    form = Form({"config": BytesIO(b"{}"), "weights": BytesIO(b"")}, None)
    with services.uploads.share() as take:
        try:
            async with staged_upload(services, Caller(), form, take) as staged:
                names = sorted(path.name for path in staged.folder.iterdir())
                assert names == [CONFIG_FILE, WEIGHTS_FILE]
                raise error
        except type(error):
            return staged.folder


def test_a_staging_folder_is_removed_when_its_upload_is_refused(start_server: StartServer) -> None:
    _, services = start_server()

    assert not asyncio.run(staged_until(services, ValueError())).exists()


def test_a_cancelled_upload_leaves_its_folder_to_the_thread_that_may_still_use_it(
    start_server: StartServer,
) -> None:
    _, services = start_server()

    assert asyncio.run(staged_until(services, asyncio.CancelledError())).is_dir()


def hangs_until(gate: threading.Event) -> Callable[..., None]:
    def hang(*_: object, **__: object) -> None:
        gate.wait(60)
        raise AdapterExists("new")

    return hang


@pytest.fixture
def while_uploads_hang(
    start_server: StartServer,
    adapter_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    gate: threading.Event,
) -> Iterator[httpx.Client]:
    """A client of a server with one adapter, whose threads for uploads all hang."""
    url, services = start_server(source_prefixes="hf://org/")
    folder, threads = adapter_folders["default"], int(services.staging.total_tokens)
    hanging = Mock(side_effect=hangs_until(gate))
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(threads) as others:
        upload(client, "there", folder)
        monkeypatch.setattr(services.registry, "add", hanging)
        for number in range(threads):
            others.submit(upload, client, f"hangs-{number}", folder)
        assert eventually(lambda: hanging.call_count == threads)
        yield client
        gate.set()


def test_a_source_that_is_not_allowed_is_refused_while_uploads_hang(
    while_uploads_hang: httpx.Client,
) -> None:
    body = {"name": "new", "source": "hf://other/name"}

    assert while_uploads_hang.post(ADAPTERS, json=body).status_code == 403


def test_an_adapter_is_rolled_back_while_uploads_hang(while_uploads_hang: httpx.Client) -> None:
    answer = while_uploads_hang.post(f"{ADAPTERS}/there/rollback", json={"revision": 1})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("GET", "", None), ("POST", "/there/rollback", {"revision": 1}), ("DELETE", "/there", None)],
)
def test_other_routes_answer_while_many_combinations_hang(
    start_server: StartServer,
    adapter_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    gate: threading.Event,
    method: str,
    path: str,
    body: Any,
) -> None:
    url, services = start_server()
    hanging = Mock(side_effect=hangs_until(gate))
    monkeypatch.setattr(services.registry, "combine", hanging)
    combination = {"name": "new", "adapters": [{"name": "there"}], "method": "linear"}

    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(MANY) as others:
        upload(client, "there", adapter_folders["default"])
        for _ in range(MANY):
            others.submit(httpx.post, f"{url}{ADAPTERS}/combine", json=combination, timeout=60)
        waiting = services.staging.statistics
        assert eventually(lambda: hanging.call_count + waiting().tasks_waiting == MANY)
        answer = client.request(method, f"{ADAPTERS}{path}", json=body)
        gate.set()

    assert answer.is_success
