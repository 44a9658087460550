"""Probes of orchestrators: is the process alive, and is it ready for requests?"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from infuse.server.api import health
from infuse.server.app import create_app
from infuse.server.services import Services
from infuse.server.settings import Settings
from tests.api.conftest import run_by_modules
from tests.api.test_generation_lifecycle import LONG, events
from tests.api.test_streaming import COMPLETIONS, eventually
from tests.factories import panic

StartServer = Callable[..., tuple[str, Services]]
SCHEDULE = "infuse.server.engine.native.scheduling.scheduler.Scheduler.schedule"
MANY = 40
"""Threads that FastAPI has for all routes that block."""


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/health/live", {"status": "ok"}),
        ("/health/ready", {"status": "ok", "changes": "accepted"}),
    ],
)
def test_a_running_server_is_alive_and_ready(
    client: httpx.Client, path: str, body: dict[str, str]
) -> None:
    response = client.get(path)

    assert (response.status_code, response.json()) == (200, body)


def test_a_stopped_engine_is_alive_and_not_ready(start_server: StartServer) -> None:
    url, services = start_server()

    services.engine.stop(timeout=0)

    assert httpx.get(f"{url}/health/live").status_code == 200
    response = httpx.get(f"{url}/health/ready")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "not_ready"
    assert int(response.headers["retry-after"]) >= 1


@pytest.mark.native
@pytest.mark.parametrize("fails", [panic, lambda: 1 / 0])
def test_where_the_model_thread_has_ended_everything_says_so(
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[], object],
) -> None:
    """Without the listener, which ends the server then."""
    run_by_modules(monkeypatch)
    settings = Settings(
        model=str(model_folder), served_model_name="tiny", adapters_dir=tmp_path / "store"
    )
    app = create_app(settings)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4}
    monkeypatch.setattr(SCHEDULE, lambda _: fails())

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            return [
                await client.post(COMPLETIONS, json=body),
                await client.post(COMPLETIONS, json=body),
                await client.get("/health/live"),
                await client.get("/health/ready"),
                await client.get("/metrics"),
            ]

    *answers, metrics = asyncio.run(ask())
    for answer in answers:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (503, "engine_dead")
        assert error["type"] == "server_error"
        assert "must be restarted" in error["message"]
        assert int(answer.headers["retry-after"]) >= 1
    counted = 'infuse_requests_total{adapter="tiny",outcome="error"} 1.0'
    assert counted in metrics.text.splitlines()


def test_a_server_whose_queue_is_nearly_full_is_not_ready_and_says_why(
    start_server: StartServer,
) -> None:
    url, _ = start_server(max_batch_rows=1, max_queue=9)
    nine = LONG | {"model": "tiny", "stream": True, "n": 9}

    with httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", COMPLETIONS, json=nine) as response:
            chunks = events(response)
            next(chunks)
            overloaded = client.get("/health/ready")
            alive = client.get("/health/live")
            metrics = client.get("/metrics").text.splitlines()
            chunks.close()
        recovers = eventually(lambda: client.get("/health/ready").status_code == 200)

    error = overloaded.json()["error"]
    assert (overloaded.status_code, error["code"]) == (503, "overloaded")
    assert "8 requests wait (9 may)" in error["message"]
    assert int(overloaded.headers["retry-after"]) >= 1
    assert alive.status_code == 200
    assert "infuse_overloaded 1.0" in metrics
    assert recovers


@pytest.mark.native
def test_a_stream_says_that_the_model_thread_has_ended(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = start_server()
    body = LONG | {"model": "tiny", "stream": True}

    with httpx.stream("POST", f"{url}{COMPLETIONS}", json=body, timeout=30) as response:
        chunks = events(response)
        next(chunks)
        monkeypatch.setattr(SCHEDULE, lambda _: panic())
        *_, last = chunks

    assert last["error"]["code"] == "engine_dead"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Set to end what hangs."""
    gate = threading.Event()
    yield gate
    gate.set()


def test_probes_of_a_storage_that_hangs_are_answered_and_hold_one_thread(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, gate: threading.Event
) -> None:
    url, services = start_server()
    hanging = Mock(side_effect=lambda: gate.wait(60))
    monkeypatch.setattr(services.registry.stored, "check", hanging)
    monkeypatch.setattr(health, "PROBE_SECONDS", 0.1)

    answers = [httpx.get(f"{url}/health/ready", timeout=30) for _ in range(3)]
    threads = hanging.call_count
    gate.set()

    assert threads == 1
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "storage_unavailable")
        assert "does not answer" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1
    assert eventually(lambda: httpx.get(f"{url}/health/ready").status_code == 200)


@pytest.mark.parametrize("path", ["/metrics", "/v1/models/tiny"])
def test_what_changes_no_adapter_is_answered_while_many_changes_hang(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, gate: threading.Event, path: str
) -> None:
    url, services = start_server()
    hanging = Mock(side_effect=lambda *_: gate.wait(60))
    monkeypatch.setattr(services.registry, "delete", hanging)

    with ThreadPoolExecutor(MANY) as clients:
        for _ in range(MANY):
            clients.submit(httpx.delete, f"{url}/v1/adapters/a", timeout=60)
        assert eventually(lambda: hanging.call_count == MANY)
        answer = httpx.get(f"{url}{path}", timeout=60)
        gate.set()

    assert answer.status_code == 200


def test_a_server_that_drains_is_not_ready_and_finishes_what_runs(
    start_server: StartServer,
) -> None:
    url, services = start_server()
    body = LONG | {"model": "tiny"}

    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(1) as other:
        alone = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
        with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
            chunks = events(response)
            text = next(chunks)["choices"][0]["text"]
            stopped = other.submit(services.engine.stop, 30)
            assert eventually(lambda: client.get("/health/ready").status_code == 503)
            text += "".join(chunk["choices"][0]["text"] for chunk in chunks)
        stopped.result()

    assert text == alone


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/v1/models"])
def test_what_answers_get_answers_head_without_a_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)

    assert head.status_code == get.status_code == 200
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"]


def test_what_does_not_answer_get_does_not_answer_head(client: httpx.Client) -> None:
    assert client.head(COMPLETIONS).status_code == 405
    assert client.head("/nowhere").status_code == 404
