"""Probes of orchestrators: is the process alive, and is it ready for requests?"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import httpx
import pytest

from server.api import health
from server.services import Services
from tests.api.test_generation_lifecycle import LONG, events
from tests.api.test_streaming import COMPLETIONS, eventually
from tests.factories import panic

StartServer = Callable[..., tuple[str, Services]]
SCHEDULE = "server.engine.native.scheduling.scheduler.Scheduler.schedule"
MANY = 40
"""Threads that FastAPI has for all routes that block."""


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
def test_a_running_server_is_alive_and_ready(client: httpx.Client, path: str) -> None:
    response = client.get(path)

    assert (response.status_code, response.json()) == (200, {"status": "ok"})


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
def test_a_server_whose_model_thread_has_ended_is_to_be_restarted(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch, fails: Callable[[], object]
) -> None:
    url, _ = start_server()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 4}
    monkeypatch.setattr(SCHEDULE, lambda _: fails())

    answer = httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=30)

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_dead")
    assert "must be restarted" in answer.json()["error"]["message"]
    assert int(answer.headers["retry-after"]) >= 1
    for path in ("/health/live", "/health/ready"):
        response = httpx.get(f"{url}{path}")
        assert (response.status_code, response.json()["error"]["type"]) == (503, "server_error")
    refused = httpx.post(f"{url}{COMPLETIONS}", json=body, timeout=30)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
    counted = 'infuse_requests_total{adapter="tiny",outcome="error"} 1.0'
    assert counted in httpx.get(f"{url}/metrics").text.splitlines()


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
        answer = httpx.get(f"{url}{path}", timeout=10)
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
