"""Bodies as they are sent: their headers, and gzip."""

import gzip
import json
import logging
import socket
import zlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.test_bad_generation_input import refused
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS, at_rest, eventually

BODY = {"model": "tiny", **PROMPTS[COMPLETIONS], "max_tokens": 4, "temperature": 0}
JSON = {"content-type": "application/json"}
PACKED = JSON | {"content-encoding": "gzip"}


def send(client: httpx.Client, content: Any, headers: dict[str, str]) -> httpx.Response:
    return client.post(COMPLETIONS, content=content, headers=headers)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server: RunningServer) -> Any:
    yield
    assert eventually(lambda: at_rest(server))


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_a_gzip_body_is_read(client: httpx.Client, encoding: str) -> None:
    plain = client.post(COMPLETIONS, json=BODY).json()["choices"]
    packed = gzip.compress(json.dumps(BODY).encode())

    answer = send(client, packed, PACKED | {"content-encoding": encoding})
    assert answer.json()["choices"] == plain
    assert send(client, iter([packed[:9], packed[9:]]), PACKED).json()["choices"] == plain
    text = json.dumps(BODY).encode()
    twice = gzip.compress(text[:7]) + gzip.compress(text[7:])
    assert send(client, twice, PACKED).json()["choices"] == plain
    identity = send(client, text, JSON | {"content-encoding": "identity"})
    assert identity.json()["choices"] == plain


def test_a_packed_request_streams_and_may_be_left(client: httpx.Client) -> None:
    body = BODY | {"stream": True, "max_tokens": 100, "ignore_eos": True}
    packed = gzip.compress(json.dumps(body).encode())
    with client.stream("POST", COMPLETIONS, content=packed, headers=PACKED) as response:
        assert next(response.iter_lines()).startswith("data: {")


def test_a_body_is_as_long_as_it_unpacks_to(client: httpx.Client, server: RunningServer) -> None:
    limit = server.services.settings.max_body_bytes
    bomb = gzip.compress(b'{"model": "' + b"x" * limit)

    assert len(bomb) < limit // 100
    error = refused(send(client, bomb, PACKED), 413)
    assert error["code"] == "body_too_large"


@pytest.mark.fault(
    "network",
    "A packed body is cut, empty, or no gzip",
    by="the body",
    promise="400 that says so.",
)
@pytest.mark.parametrize(
    "body",
    [b"", b"{}", gzip.compress(b"{}")[:-4], gzip.compress(b"{}")[:5], gzip.compress(b"{}") + b"x"],
    ids=["empty", "plain", "cut", "head", "more"],
)
def test_a_broken_gzip_body_is_refused(client: httpx.Client, body: bytes) -> None:
    error = refused(send(client, body, PACKED))

    assert not body or "Content-Encoding is gzip" in error["message"]


@pytest.mark.parametrize("encoding", ["br", "deflate", "zstd", "gzip, gzip", "nonsense"])
def test_another_encoding_is_refused_with_what_is_read(client: httpx.Client, encoding: str) -> None:
    body = zlib.compress(json.dumps(BODY).encode())
    error = refused(send(client, body, JSON | {"content-encoding": encoding}))

    assert error["param"] == "Content-Encoding"
    assert "gzip" in error["message"]


@pytest.mark.parametrize(
    "path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/rank", "/v1/adapters/combine"]
)
@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_said_to_be_json_names_the_header(
    client: httpx.Client, path: str, kind: str | None
) -> None:
    headers = {} if kind is None else {"content-type": kind}
    error = refused(client.post(path, content=json.dumps(BODY), headers=headers))

    assert error["param"] == "Content-Type"
    assert ("is missing" if kind is None else kind) in error["message"]
    assert "application/json" in error["message"]


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat", "/api/show"])
def test_the_apis_of_others_read_packed_bodies_and_name_what_is_wrong_with_one(
    client: httpx.Client, path: str
) -> None:
    said = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    body = said if path == "/v1/messages" else {"model": "tiny"}
    packed = gzip.compress(json.dumps(body).encode())

    assert client.post(path, content=packed, headers=PACKED).status_code == 200
    for headers, name in ((JSON, "Content-Encoding: gzip"), ({}, "Content-Type")):
        error = client.post(path, content=packed, headers=headers).json()["error"]
        assert name in (error if path.startswith("/api/") else error["message"])


def test_a_gzip_body_that_is_not_said_to_be_one_names_the_header(client: httpx.Client) -> None:
    error = refused(send(client, gzip.compress(json.dumps(BODY).encode()), JSON))

    assert error["param"] == "Content-Encoding"
    assert "Content-Encoding: gzip" in error["message"]


def test_a_packed_upload_is_read(client: httpx.Client, adapter_folders: dict[str, Path]) -> None:
    folder = adapter_folders["default"]
    files = {
        "config": (folder / "adapter_config.json").read_bytes(),
        "weights": (folder / "adapter_model.safetensors").read_bytes(),
    }
    request = client.build_request(
        "POST", "/v1/adapters", data={"name": "packed"}, files=files, params={"dry_run": True}
    )
    packed = gzip.compress(request.read())
    headers = {"content-type": request.headers["content-type"], "content-encoding": "gzip"}
    response = client.post(
        "/v1/adapters", content=packed, headers=headers, params={"dry_run": True}
    )

    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/v1/adapters", "multipart/form-data; boundary=x"), (COMPLETIONS, "application/json")],
)
def test_a_client_that_leaves_within_its_body_is_no_failure_of_the_server(
    client: httpx.Client, path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def count(status: int) -> float:
        series = f'infuse_http_requests_total{{method="POST",route="{path}",status="{status}"}} '
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith(series))

    before = {status: count(status) for status in (400, 499, 500)}
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection((client.base_url.host, client.base_url.port)) as leaving:
        leaving.sendall(head.encode() + b"--x")

    assert eventually(lambda: count(499) == before[499] + 1)
    assert (count(400), count(500)) == (before[400], before[500])
    assert [each.message for each in caplog.records if each.levelno >= logging.ERROR] == []
