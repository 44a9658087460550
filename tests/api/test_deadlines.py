"""A request ends when its time is over: its client's, and the server's, in the queue and after."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.services import Services
from tests.api.conftest import RunningServer, save_model
from tests.api.test_generation_lifecycle import StartServer, events
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS, at_rest, eventually

HEADER = "X-Request-Timeout"
ENDLESS = {"model": "tiny", "temperature": 0, "ignore_eos": True, "max_tokens": 30_000}
"""More than any test waits for."""


@pytest.fixture(scope="module")
def patient_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a long window."""
    return save_model(tmp_path_factory.mktemp("patient") / "tiny", max_position_embeddings=32_768)


@pytest.fixture
def one_row(start_server: StartServer, patient_model: Path) -> Any:
    """Start a server that runs one request at a time."""

    def start(**settings: Any) -> tuple[httpx.Client, Services]:
        url, services = start_server(
            model=str(patient_model), max_batch_rows=1, kv_cache_tokens=65_536, **settings
        )
        return httpx.Client(base_url=url, timeout=60), services

    return start


def warm_up(client: httpx.Client, path: str) -> None:
    """A first request takes long to prepare, before anything runs."""
    client.post(path, json=ENDLESS | PROMPTS[path] | {"max_tokens": 1})


def is_at_rest(services: Services) -> bool:
    return eventually(lambda: at_rest(RunningServer("", services, Path(), {})))


def allowing(seconds: float) -> dict[str, str]:
    return {HEADER: f"{seconds:g}"}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_request_whose_time_runs_out_while_it_runs_ends_and_holds_nothing(
    one_row: Any, path: str
) -> None:
    client, services = one_row()
    warm_up(client, path)

    answer = client.post(path, json=ENDLESS | PROMPTS[path], headers=allowing(1))

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (
        504,
        "deadline_exceeded",
        "server_error",
    )
    assert f"{HEADER} allows 1 s" in error["message"]
    assert is_at_rest(services)
    counted = 'infuse_requests_total{adapter="tiny",outcome="timeout"} 1.0'
    assert counted in client.get("/metrics").text.splitlines()


def test_a_stream_whose_time_runs_out_ends_with_an_error_after_what_came(one_row: Any) -> None:
    client, services = one_row()
    warm_up(client, COMPLETIONS)
    body = ENDLESS | PROMPTS[COMPLETIONS] | {"stream": True}

    with client.stream("POST", COMPLETIONS, json=body, headers=allowing(2)) as answer:
        *chunks, last = events(answer)

    assert answer.status_code == 200
    assert len(chunks) > 1
    assert last["error"]["code"] == "deadline_exceeded"
    assert is_at_rest(services)


@pytest.fixture
def occupied(one_row: Any) -> Iterator[Any]:
    """Start a server whose only row is in use."""
    with contextlib.ExitStack() as streams:

        def start(before: Any = lambda _: None, **settings: Any) -> tuple[httpx.Client, Services]:
            client, services = one_row(**settings)
            before(client)
            body = ENDLESS | PROMPTS[COMPLETIONS] | {"stream": True}
            answer = streams.enter_context(client.stream("POST", COMPLETIONS, json=body))
            chunks = events(answer)
            next(chunks)
            # A generator that is collected closes the connection.
            streams.callback(chunks.close)
            return client, services

        yield start


def test_a_request_whose_time_runs_out_in_the_queue_ends_and_the_others_go_on(
    occupied: Any,
) -> None:
    client, services = occupied()

    answer = client.post(COMPLETIONS, json=ENDLESS | PROMPTS[COMPLETIONS], headers=allowing(0.5))

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert eventually(lambda: services.engine.stats().waiting == 0)
    assert services.engine.stats().running == 1


def test_a_request_that_cannot_start_in_time_is_refused_at_once(occupied: Any) -> None:
    seconds = []

    def learn(client: httpx.Client) -> None:
        """From a request that the server has seen end, it knows how long one takes."""
        began = time.monotonic()
        client.post(COMPLETIONS, json=ENDLESS | PROMPTS[COMPLETIONS] | {"max_tokens": 500})
        seconds.append(time.monotonic() - began)

    client, services = occupied(learn)
    short = ENDLESS | PROMPTS[COMPLETIONS]
    answer = client.post(COMPLETIONS, json=short, headers=allowing(seconds[0] / 4))

    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (429, "wait_too_long")
    assert "would wait about" in error["message"]
    assert int(answer.headers["retry-after"]) >= 1
    assert services.engine.stats().waiting == 0


def test_no_request_stays_in_the_queue_for_longer_than_the_server_lets_it(occupied: Any) -> None:
    client, services = occupied(max_queue_seconds=0.5)

    answer = client.post(COMPLETIONS, json=ENDLESS | PROMPTS[COMPLETIONS])

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "queue_timeout")
    assert int(answer.headers["retry-after"]) >= 1
    assert eventually(lambda: services.engine.stats().waiting == 0)
    assert services.engine.stats().running == 1, "what has started may take longer"


def test_the_server_bounds_the_time_of_those_that_ask_for_more(one_row: Any) -> None:
    client, services = one_row(max_request_seconds=1)
    body = ENDLESS | PROMPTS[COMPLETIONS]

    for headers in ({}, allowing(1000)):
        answer = client.post(COMPLETIONS, json=body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
        assert "--max-request-seconds" in answer.json()["error"]["message"]
    assert is_at_rest(services)


def test_a_request_that_is_prepared_too_late_is_not_queued(
    client: httpx.Client, server: RunningServer
) -> None:
    for adapter in ("tiny", "default"):
        body = PROMPTS[CHAT] | {"model": adapter, "max_tokens": 1}
        answer = client.post(CHAT, json=body, headers=allowing(1e-6))
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert eventually(lambda: at_rest(server))


def test_a_request_that_ends_in_time_is_answered(client: httpx.Client) -> None:
    body = PROMPTS[CHAT] | {"model": "tiny", "max_tokens": 2}

    assert client.post(CHAT, json=body, headers=allowing(30)).status_code == 200


@pytest.mark.parametrize("value", ["soon", "0", "-1", "inf", "nan", "1 s"])
def test_a_time_that_is_none_is_refused(client: httpx.Client, value: str) -> None:
    body = PROMPTS[CHAT] | {"model": "tiny", "max_tokens": 2}

    answer = client.post(CHAT, json=body, headers={HEADER: value})

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == HEADER
