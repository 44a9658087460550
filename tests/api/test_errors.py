"""Every error has OpenAI's shape, and none shows the server's insides."""

import errno
import json
import logging
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from infuse.adapters.errors import AdapterError, WrongCall
from infuse.server.errors import from_adapter_error
from infuse.server.services import Services
from tests.api.conftest import RunningServer
from tests.api.test_adapters import ADAPTERS, PROMPT
from tests.factories import panic

RANKED = {"prompt": "x", "choices": ["a", "b"]}
StartServer = Callable[..., tuple[str, Services]]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code", "details"]
    assert error["message"]
    kind = "invalid_request_error" if status < 500 else "server_error"
    assert error["type"] == kind
    for detail in error["details"]:
        assert list(detail) == ["field", "problem", "fix"]
    return dict(error)


@pytest.mark.parametrize(
    "path", ["/console", "/v1", "/v1/nothing", "/v2/models", "/metrics/x", "/é%00"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_an_unknown_path_is_said_to_be_one(client: httpx.Client, method: str, path: str) -> None:
    error = error_of(client.request(method, path), 404)

    assert error["message"].startswith(f"There is nothing at {method} ")
    assert "/docs" in error["message"]


METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def paths(server: RunningServer) -> list[str]:
    described = httpx.get(f"{server.base_url}/openapi.json").json()["paths"]
    return [path.replace("{", "").replace("}", "") for path in described]


def test_a_wrong_method_is_told_all_that_the_path_has(
    client: httpx.Client, server: RunningServer
) -> None:
    for path in paths(server):
        answers = {method: client.request(method, path) for method in METHODS}
        wrong = {method: each for method, each in answers.items() if each.status_code == 405}
        for method, answer in wrong.items():
            if method != "HEAD":
                # Anthropic's and Ollama's paths have errors of their own form.
                assert f"{method} is not allowed at {path}" in answer.text
            allowed = answer.headers["allow"].split(", ")
            assert sorted(allowed) == sorted(METHODS - wrong.keys()), path


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (ADAPTERS, "GET, HEAD, POST"),
        (f"{ADAPTERS}/default", "GET, HEAD, PUT, PATCH, DELETE"),
        ("/v1/merges/one", "GET, HEAD, DELETE"),
        ("/v1/completions", "POST"),
    ],
)
def test_a_path_of_several_routes_names_the_methods_of_all(
    client: httpx.Client, path: str, allowed: str
) -> None:
    assert client.options(path).headers["allow"] == allowed


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"model": 1}', b"\xff\xfe"])
def test_a_malformed_body_is_a_400(client: httpx.Client, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}

    error = error_of(client.post(path, content=body, headers=headers), 400)

    assert error["code"] == "invalid_request"
    assert error["param"] == error["details"][0]["field"]


def test_a_body_nested_too_deep_is_a_400(client: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}

    response = client.post("/v1/completions", content=b"[" * 99_999, headers=headers)

    assert error_of(response, 400)["code"] == "invalid_request"


def test_every_fault_of_a_body_is_listed(client: httpx.Client) -> None:
    body = {"model": "", "prompt": "x", "temperature": -1, "max_tokens": "many"}

    error = error_of(client.post("/v1/completions", json=body), 400)

    assert [each["field"] for each in error["details"]] == ["model", "temperature", "max_tokens"]
    assert error["message"].startswith("model: ")


def test_what_a_check_of_ours_says_stands_alone(client: httpx.Client) -> None:
    body = PROMPT | {"model": "default", "stream_options": {"include_usage": True}}

    error = error_of(client.post("/v1/completions", json=body), 400)

    assert error["message"] == "stream_options: needs stream: true; leave it out otherwise"


@pytest.fixture
def broken(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A server whose store fails in a way that nobody foresaw."""
    url, services = start_server()

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("the password is hunter2")

    monkeypatch.setattr(services.registry.stored, "names", fail)
    return url


def test_an_unforeseen_failure_tells_the_log_and_not_the_client(
    broken: str, caplog: pytest.LogCaptureFixture
) -> None:
    response = httpx.get(broken + ADAPTERS)

    error = error_of(response, 500)
    assert error["message"] == "The server failed; its log says why."
    assert "hunter2" not in response.text
    assert "Traceback" not in response.text
    assert "hunter2" in caplog.text
    assert f"GET {ADAPTERS} failed." in caplog.text
    assert httpx.get(f"{broken}/health/live").status_code == 200


class Panic(BaseException):
    """Raise what is no Exception, as a library in Rust does."""


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (Panic("hunter2"), 500, "The server failed; its log says why."),
        (BaseExceptionGroup("hunter2", [Panic()]), 500, "The server failed; its log says why."),
        (MemoryError("hunter2"), 503, "The server has no memory, open files or processes left"),
        (OSError(errno.EPERM, "hunter2"), 500, "The server failed; its log says why."),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", ADAPTERS])
def test_what_a_route_did_not_foresee_is_an_answer_of_our_shape(
    start_server: StartServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    raised: BaseException,
    status: int,
    message: str,
    path: str,
) -> None:
    url, services = start_server()

    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(services.registry.stored, "names", fail)
    monkeypatch.setattr(services.engine, "submit", fail)
    body = {"model": "tiny", "prompt": "A"}
    with httpx.Client(base_url=url) as client:
        response = client.get(path) if path == ADAPTERS else client.post(path, json=body)
        assert client.post("/health/live").status_code == 405  # httpx sends no POST again.

    assert error_of(response, status)["message"].startswith(message)
    assert "hunter2" not in response.text
    assert "hunter2" in caplog.text
    assert httpx.get(f"{url}/health/live").status_code == 200
    assert services.registry.stats().leases == 0


def test_a_stream_that_fails_unforeseen_ends_with_an_error(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("hunter2")

    monkeypatch.setattr("infuse.server.api.completion_writer.CompletionWriter.chunks", fail)
    body = {"model": "tiny", "prompt": "A", "stream": True}
    text = client.post("/v1/completions", json=body).text

    error, done = (line.removeprefix("data: ") for line in text.splitlines() if line)
    assert json.loads(error)["error"]["message"] == "The server failed; its log says why."
    assert done == "[DONE]"


def test_a_panic_in_a_library_is_an_unforeseen_failure_and_holds_no_thread(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, services = start_server()
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    encode = services.engine.model.tokenizer.encode
    monkeypatch.setattr(services.engine.model.tokenizer, "encode", lambda *_, **__: panic())
    monkeypatch.setattr(services.registry.stored, "names", lambda *_, **__: panic())

    for _ in range(6):
        for answer in (
            httpx.post(f"{url}/v1/completions", json=body | {"stream": True}),
            httpx.post(f"{url}/v1/rank", json={"model": "tiny", "inputs": [RANKED]}),
            httpx.get(url + ADAPTERS),
        ):
            assert "log says why" in error_of(answer, 500)["message"]

    monkeypatch.setattr(services.engine.model.tokenizer, "encode", encode)
    assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200


@pytest.mark.parametrize("error", [AdapterError("odd"), WrongCall("odd")])
def test_an_error_without_a_status_is_a_500_and_logged(
    error: AdapterError, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)

    assert from_adapter_error(error).status == 500
    assert "without a status" in caplog.text


def test_openai_s_client_raises_its_own_errors(server: RunningServer) -> None:
    client = openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)

    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="x")

    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert json.loads(caught.value.response.content)["error"]["details"] == []
