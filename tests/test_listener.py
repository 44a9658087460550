"""The HTTP server over real sockets: how it stops, and what it bounds."""

import asyncio
import contextlib
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import psutil
import pytest

from infuse.server import listener
from infuse.server.settings import MEBIBYTE, Settings
from tests.api.conftest import RunningServer, run_server
from tests.api.test_health import MANY
from tests.api.test_streaming import at_rest, eventually
from tests.factories import CHAT_TEMPLATE, save_tiny_model
from tests.served import address_of

INFUSE = Path(sys.executable).with_name("infuse")
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
SLOW_TEMPLATE = (
    "{% if slow %}{% for a in range(5000) %}{% for b in range(5000) %}{% endfor %}{% endfor %}"
    "{% endif %}" + CHAT_TEMPLATE
)
SLOW_SCHEMA = {"type": "integer", "multipleOf": 1_000_003}
LONG: dict[str, Any] = {"model": "tiny", "prompt": "A", "ignore_eos": True, "max_tokens": 250}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny", SLOW_TEMPLATE)


Process = tuple[subprocess.Popen[bytes], str]


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Callable[[float], Process]]:
    """Start `infuse serve` with one batch row and so many seconds to drain."""

    def start(drain_timeout: float) -> Process:
        command = [str(INFUSE), "serve", "--port", "0"]
        command += ["--model", str(model_folder), "--served-model-name", "tiny"]
        command += ["--adapters-dir", str(tmp_path / "store"), "--max-batch-rows", "1"]
        command += ["--drain-timeout", str(drain_timeout)]
        log = tmp_path / "log"
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        servers.callback(server.wait)
        servers.callback(server.kill)
        return server, address_of(server, log, 120)

    with ExitStack() as servers:
        yield start


async def half_an_upload(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which the second half of an upload is still to be sent."""
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    kind = "multipart/form-data; boundary=x"
    head = f"POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
    writer.write(f"{head}Content-Length: 1000\r\n\r\n--x\r\n".encode())
    await writer.drain()
    return reader, writer


def response_of(received: bytes) -> httpx.Response:
    head, _, body = received.partition(b"\r\n\r\n")
    status, *headers = head.decode().split("\r\n")
    pairs = [header.split(": ", 1) for header in headers]
    return httpx.Response(int(status.split()[1]), headers=pairs, content=body)


async def until_in_flight(client: httpx.AsyncClient, requests: int) -> None:
    count = 0
    while count < requests:
        text = (await client.get("/metrics")).text
        found = re.findall(r"^infuse_requests_(?:running|waiting) (\d+)", text, re.M)
        count = sum(map(int, found))


def status_of(response: httpx.Response) -> int:
    return response.status_code


def arguments_of_children(server: Process) -> list[str]:
    """Of all processes that the server has started."""
    found: list[str] = []
    for child in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found += child.cmdline()
    return found


@pytest.mark.fault(
    "process",
    "The server is told to stop while requests of every kind run",
    by="SIGTERM",
    promise="Each is answered when the drain's time is over, and the process ends with 0.",
)
def test_the_drain_answers_all_that_is_in_flight(
    start: Callable[[float], Process],
) -> None:
    server, url = start(0.5)
    message = {"messages": [{"role": "user", "content": "A"}], "model": "tiny"}
    many: dict[str, tuple[str, dict[str, Any]]] = {
        "whole": (COMPLETIONS, LONG | {"n": 100}),
        "template": (CHAT, message | {"chat_template_kwargs": {"slow": True}}),
        "rank": ("/v1/rank", {"model": "tiny", "inputs": [{"prompt": "A", "choices": ["b"] * 40}]}),
    }

    held = [
        LONG | {"structured_outputs": {"json": SLOW_SCHEMA | {"description": f"{number}"}}}
        for number in range(20)
    ]

    async def ask() -> tuple[dict[str, httpx.Response], list[str]]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            streamed = LONG | {"n": 100, "stream": True}
            async with client.stream("POST", COMPLETIONS, json=streamed) as stream:
                lines = stream.aiter_lines()
                first = await anext(lines)
                received, sent = await half_an_upload(url)
                tasks = {
                    name: asyncio.create_task(client.post(path, json=body))
                    for name, (path, body) in many.items()
                }
                await until_in_flight(client, 230)
                # Some are compiled, and perhaps refused in time; the others wait for their turn.
                slow = [asyncio.create_task(client.post(COMPLETIONS, json=each)) for each in held]
                while not any("vetting" in part for part in arguments_of_children(server)):
                    await client.get("/health/live")
                server.send_signal(signal.SIGTERM)
                events = [first] + [line async for line in lines]
                answers = dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))
                answers["constraint"] = max([await each for each in slow], key=status_of)
            answers["upload"] = response_of(await received.read())
            sent.close()
            return answers, [line.removeprefix("data: ") for line in events if line]

    answers, events = asyncio.run(ask())

    for name, answer in answers.items():
        assert answer.status_code == 503, (name, answer.text)
        assert int(answer.headers["retry-after"]) >= 1, name
        assert answer.json()["error"]["type"] == "server_error", name
    *_, last, done = events
    assert done == "[DONE]"
    assert "shutting down" in json.loads(last)["error"]["message"]
    assert server.wait(30) == 0


def test_a_clean_drain_lets_answers_end_and_the_process_ends_with_0(
    start: Callable[[float], Process],
) -> None:
    server, url = start(30.0)
    body = LONG | {"stream": True, "max_tokens": 100}

    with httpx.stream("POST", url + COMPLETIONS, json=body, timeout=60) as stream:
        lines = (line for line in stream.iter_lines() if line)
        next(lines)
        server.send_signal(signal.SIGINT)
        *_, last, done = lines

    assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert server.wait(30) == 0


@pytest.mark.fault(
    "process",
    "The server is told to stop twice",
    by="two SIGTERM",
    promise="The second one ends the process at once.",
)
def test_a_second_signal_ends_the_process_at_once(start: Callable[[float], Process]) -> None:
    server, url = start(300.0)

    with httpx.stream("POST", url + COMPLETIONS, json=LONG | {"stream": True, "n": 100}) as stream:
        next(stream.iter_lines())
        server.send_signal(signal.SIGTERM)
        while is_listening(url):
            pass
        server.send_signal(signal.SIGTERM)

        assert server.wait(60) == 128 + signal.SIGTERM


def test_the_drain_ends_streams_while_many_changes_of_adapters_hang(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=tmp_path / "store",
        max_batch_rows=1,
        drain_timeout=0.5,
    )
    gate = threading.Event()
    hanging = Mock(side_effect=lambda *_: gate.wait(60))

    def last_lines(stream: httpx.Response) -> list[str]:
        try:
            return [line for line in stream.iter_lines() if line][-2:]
        finally:
            gate.set()

    with ThreadPoolExecutor(MANY + 1) as clients, ExitStack() as opened:
        opened.callback(gate.set)
        with run_server(settings) as (url, services):
            monkeypatch.setattr(services.registry, "delete", hanging)
            for _ in range(MANY):
                clients.submit(httpx.delete, f"{url}/v1/adapters/a", timeout=60)
            body = LONG | {"n": 100, "stream": True}
            stream = opened.enter_context(
                httpx.stream("POST", url + COMPLETIONS, json=body, timeout=60)
            )
            assert eventually(lambda: hanging.call_count == MANY)
            ending = clients.submit(last_lines, stream)
        last, done = ending.result()

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
    assert done == "data: [DONE]"


def is_listening(url: str) -> bool:
    address = httpx.URL(url)
    try:
        with socket.create_connection((address.host, address.port or 80), timeout=1):
            return True
    except OSError:
        return False


# Limits, in a server of this process


@pytest.fixture(scope="module")
def limited(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Four connections, a second for everything, and small bodies."""
    folder = tmp_path_factory.mktemp("limited")
    settings = Settings(
        model=str(model_folder),
        served_model_name="tiny",
        adapters_dir=folder / "store",
        max_connections=4,
        max_body_bytes=1 << 16,
        max_upload_bytes=MEBIBYTE,
        receive_timeout=1.0,
        send_timeout=1.0,
    )
    with run_server(settings) as (url, services):
        yield RunningServer(url, services, model_folder, {})


@contextmanager
def connection(server: RunningServer, **options: int) -> Iterator[socket.socket]:
    address = httpx.URL(server.base_url)
    with closing(socket.socket()) as connected:
        connected.settimeout(30)
        for name, value in options.items():
            connected.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
        connected.connect((address.host, address.port))
        yield connected


def received(connected: socket.socket) -> bytes:
    """All bytes that come until the server closes."""
    parts = []
    while part := connected.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def request(method: str, path: str, *headers: str) -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""]).encode()


def error_of(answer: bytes, status: int) -> dict[str, Any]:
    response = response_of(answer)
    assert response.status_code == status, answer
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-content-type-options"] == "nosniff"
    error = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code", "details"]
    return dict(error)


@pytest.mark.fault(
    "network",
    "A head does not come to its end",
    by="a raw socket",
    promise="408 after `--receive-timeout`.",
)
def test_a_head_that_does_not_come_is_refused(limited: RunningServer) -> None:
    with connection(limited) as connected:
        connected.sendall(request("GET", "/health/live")[:-2])

        assert error_of(received(connected), 408)["code"] == "request_timeout"


@pytest.mark.fault(
    "network",
    "A head comes byte by byte",
    by="a raw socket",
    promise="408 after `--receive-timeout` all the same.",
)
def test_a_head_that_comes_byte_by_byte_is_refused_all_the_same(limited: RunningServer) -> None:
    with connection(limited) as connected:
        connected.settimeout(0.1)
        answer = b""
        while not answer:
            with contextlib.suppress(TimeoutError):
                connected.sendall(b"G")
                answer = connected.recv(1000)
        assert b" 408 " in answer or b" 400 " in answer


@pytest.mark.fault(
    "network",
    "A connection brings no request",
    by="a raw socket",
    promise="It is closed.",
)
def test_a_connection_without_a_request_is_closed_without_a_word(limited: RunningServer) -> None:
    with connection(limited) as connected:
        assert received(connected) == b""


@pytest.mark.fault(
    "network",
    "Half a body comes",
    by="a raw socket",
    promise="408 after `--receive-timeout`.",
)
@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/adapters"])
def test_a_body_that_does_not_come_is_refused(limited: RunningServer, path: str) -> None:
    kind = "application/json" if path == COMPLETIONS else "multipart/form-data; boundary=x"
    with connection(limited) as connected:
        headers = (f"Content-Type: {kind}", "Content-Length: 1000")
        connected.sendall(request("POST", path, *headers) + b"--x\r\n")

        assert error_of(received(connected), 408)["code"] == "request_timeout"


@pytest.mark.fault(
    "network",
    "A body comes byte by byte",
    by="a raw socket",
    promise="408 after `--receive-timeout` all the same.",
)
def test_a_body_that_comes_byte_by_byte_is_refused_all_the_same(limited: RunningServer) -> None:
    headers = ("Content-Type: application/json", "Content-Length: 1000")
    with connection(limited) as connected:
        connected.settimeout(0.1)
        connected.sendall(request("POST", COMPLETIONS, *headers))
        answer = b""
        while not answer:
            with contextlib.suppress(TimeoutError):
                connected.sendall(b" ")
                answer = connected.recv(1000)
        assert response_of(answer).status_code == 408


@pytest.mark.fault(
    "network",
    "A head has no end",
    by="a raw socket",
    promise="It is refused beyond 64 KiB.",
)
@pytest.mark.parametrize("start", ["GET / HTTP/1.1\r\nX: ", "GET /"])
def test_a_head_without_end_is_refused(limited: RunningServer, start: str) -> None:
    with connection(limited) as connected:
        connected.sendall(start.encode())
        with contextlib.suppress(OSError):
            for _ in range(64):
                connected.sendall(b"x" * (1 << 16))
        with contextlib.suppress(ConnectionResetError):
            answer = received(connected)
            assert not answer or response_of(answer).status_code in (400, 431)
    assert httpx.get(f"{limited.base_url}/health/live").status_code == 200


@pytest.mark.fault(
    "network",
    "A client speaks TLS, or something else",
    by="a raw socket",
    promise="400, as every error is shaped.",
)
def test_what_is_no_http_is_refused_in_our_shape(limited: RunningServer) -> None:
    with connection(limited) as connected:
        connected.sendall(b"\x16\x03\x01 this is TLS\r\n\r\n")

        assert error_of(received(connected), 400)["code"] == "invalid_request"


@pytest.mark.fault(
    "network",
    "A client does not read its stream",
    by="a raw socket with a small buffer",
    promise="After `--send-timeout` its rows are free.",
)
def test_a_stream_that_nobody_reads_is_cancelled(limited: RunningServer) -> None:
    body = json.dumps(LONG | {"n": 100, "stream": True, "logprobs": 5}).encode()
    headers = ("Content-Type: application/json", f"Content-Length: {len(body)}")
    before = limited.services.engine.stats().generated_tokens
    with connection(limited, SO_RCVBUF=4096) as connected:
        connected.sendall(request("POST", COMPLETIONS, *headers) + body)
        connected.recv(100)

        assert eventually(lambda: at_rest(limited))
    assert limited.services.engine.stats().generated_tokens - before < 100 * 250


@pytest.mark.fault(
    "network",
    "All connections are taken and idle",
    by="raw sockets",
    promise="The one that was idle longest is closed for a new one.",
)
def test_more_connections_than_there_may_be_replace_those_that_wait(
    limited: RunningServer,
) -> None:
    with ExitStack() as opened:
        idle = [opened.enter_context(connection(limited)) for _ in range(4)]
        answers = []
        for _ in range(6):
            with connection(limited) as busy:
                busy.sendall(request("GET", "/health/live", "Connection: close"))
                answers.append(response_of(received(busy)).status_code)
        with contextlib.suppress(ConnectionResetError):
            assert received(idle[0]) == b""

    assert answers == [200] * 6


@pytest.mark.fault(
    "network",
    "All connections are taken and at work",
    by="raw sockets",
    promise="One more is 503 with a time to come back.",
)
def test_where_all_connections_are_at_work_one_more_is_told_to_come_back(
    limited: RunningServer,
) -> None:
    slow = ("Content-Type: application/json", "Content-Length: 1000")
    with ExitStack() as opened:
        for _ in range(4):
            opened.enter_context(connection(limited)).sendall(request("POST", COMPLETIONS, *slow))
        answer = opened.enter_context(connection(limited))
        refused = received(answer)

    assert error_of(refused, 503)["code"] == "too_many_connections"
    assert int(response_of(refused).headers["retry-after"]) >= 1


def answer_to_a_head(connected: socket.socket, length: int, *headers: str) -> bytes:
    """The answer to a request of which the body has not come yet."""
    connected.sendall(request("POST", COMPLETIONS, f"Content-Length: {length}", *headers))
    answer = b""
    while not answer.endswith(b"}}"):
        answer += connected.recv(1 << 16)
    return answer


def is_reset(connected: socket.socket, more: bytes) -> bool:
    """Whether the server takes no more of a request."""
    try:
        connected.sendall(more)
    except ConnectionError:
        return True
    return False


@pytest.mark.fault(
    "network",
    "A body comes after its refusal",
    by="a raw socket",
    promise="It is read and thrown away; then the connection is closed, without a reset.",
)
def test_a_request_is_sent_to_its_end_after_its_refusal(limited: RunningServer) -> None:
    with connection(limited) as connected:
        answer = answer_to_a_head(connected, MEBIBYTE, "Connection: close")
        assert error_of(answer, 413)["code"] == "body_too_large"
        for _ in range(16):
            connected.sendall(b"x" * (MEBIBYTE // 16))

        assert received(connected) == b""


def test_a_connection_that_stays_open_answers_after_a_refused_body(limited: RunningServer) -> None:
    with connection(limited) as connected:
        answer_to_a_head(connected, MEBIBYTE)
        connected.sendall(b"x" * MEBIBYTE)
        connected.sendall(request("GET", "/health/live", "Connection: close"))

        assert response_of(received(connected)).status_code == 200


@pytest.mark.parametrize("what", ["a head without end", "no request"])
def test_a_connection_that_is_refused_before_its_request_is_read_is_not_reset(
    limited: RunningServer, what: str
) -> None:
    start = b"GET / HTTP/1.1\r\nX: " if what == "a head without end" else b"\x16\x03\x01\r\n\r\n"
    with connection(limited) as connected:
        connected.sendall(start)
        for _ in range(16):
            connected.sendall(b"x" * (MEBIBYTE // 16))

        assert response_of(received(connected)).status_code in (400, 431)


def test_a_client_that_sends_slowly_reads_its_refusal(limited: RunningServer) -> None:
    def refusals() -> float:
        text = httpx.get(f"{limited.base_url}/metrics").text
        found = re.findall(
            rf'^infuse_http_requests_total.*"{COMPLETIONS}",status="413"}} (.+)', text, re.M
        )
        return sum(map(float, found))

    def body() -> Iterator[bytes]:
        yield b"x"
        assert eventually(lambda: refusals() > before)
        for _ in range(16):
            yield b"x" * (MEBIBYTE // 16)

    before = refusals()
    headers = {"Content-Length": str(MEBIBYTE + 1), "Connection": "close"}
    answer = httpx.post(limited.base_url + COMPLETIONS, content=body(), headers=headers)

    assert answer.status_code == 413


@pytest.mark.fault(
    "network",
    "A refused body has no end",
    by="a raw socket",
    promise="The connection is closed beyond twice `--max-upload-bytes`.",
)
@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
def test_a_refused_body_is_not_read_without_end(
    limited: RunningServer, headers: tuple[str, ...]
) -> None:
    with connection(limited) as connected:
        answer_to_a_head(connected, 1 << 30, *headers)
        assert eventually(lambda: is_reset(connected, b"x" * MEBIBYTE), 30)


@pytest.mark.fault(
    "network",
    "A refused body comes byte by byte",
    by="a raw socket",
    promise="The connection is closed after `--receive-timeout`.",
)
@pytest.mark.parametrize("headers", [(), ("Connection: close",)])
def test_a_refused_body_is_not_waited_for_without_end(
    limited: RunningServer, headers: tuple[str, ...]
) -> None:
    with connection(limited) as connected:
        answer_to_a_head(connected, 1 << 30, *headers)
        assert eventually(lambda: is_reset(connected, b"x"), 30)


def test_refused_requests_that_are_still_sent_take_no_connection_from_others(
    limited: RunningServer,
) -> None:
    with ExitStack() as opened:
        for _ in range(4):
            refused = opened.enter_context(connection(limited))
            answer_to_a_head(refused, MEBIBYTE, "Connection: close")

        assert httpx.get(f"{limited.base_url}/health/live").status_code == 200


def test_a_server_that_stops_does_not_wait_for_the_rest_of_a_refused_request(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(model=str(model_folder), adapters_dir=tmp_path, max_body_bytes=1)
    with run_server(settings) as (url, services):
        server = RunningServer(url, services, model_folder, {})
        with ExitStack() as opened:
            for headers in ((), ("Connection: close",)):
                refused = opened.enter_context(connection(server))
                answer_to_a_head(refused, MEBIBYTE, *headers)
            clients = opened.pop_all()
    clients.close()

    assert "The drain's time is over" not in caplog.text


def test_compose_gives_a_container_longer_than_the_drain_takes() -> None:
    compose = (Path(__file__).parents[1] / "docker" / "compose.yaml").read_text()
    grace = re.search(r"stop_grace_period: (\d+)s", compose)
    drain = Settings.model_fields["drain_timeout"].default

    assert grace is not None
    assert int(grace[1]) > drain + listener.ANSWERING_SECONDS + listener.WRITING_SECONDS


def test_what_the_start_made_is_never_looked_through_for_garbage() -> None:
    try:
        listener.freeze_heap()
        assert gc.get_freeze_count() > 0
        assert len(gc.get_objects()) < gc.get_freeze_count()
    finally:
        gc.unfreeze()
