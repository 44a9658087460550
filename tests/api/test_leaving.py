"""Clients that leave at any moment of a request, by a raw socket: nothing of theirs stays."""

import json
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.settings import Settings
from tests.api.conftest import RunningServer, run_by_modules, run_server, save_model
from tests.api.stores import ALL_USAGE
from tests.api.test_generation_lifecycle import events
from tests.api.test_streaming import COMPLETIONS, at_rest, eventually

LONG = {"ignore_eos": True, "temperature": 0, "max_tokens": 20_000}
SHORT = {"model": "tiny", "prompt": "A", "ignore_eos": True, "temperature": 0, "max_tokens": 8}
PROMPT_TOKENS = 12_000


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, adapter_folders: dict[str, Path]
) -> Iterator[RunningServer]:
    """One batch row, and a window in which a prompt takes many steps."""
    folder = tmp_path_factory.mktemp("patient")
    model = save_model(folder / "tiny", max_position_embeddings=32_768)
    settings = Settings(
        model=str(model),
        served_model_name="tiny",
        adapters_dir=folder / "store",
        preload_adapters=adapter_folders["mlp"].parent,
        max_batch_rows=1,
        kv_cache_tokens=65_536,
        prefix_cache=False,
    )
    with pytest.MonkeyPatch.context() as patch:
        run_by_modules(patch)
        with run_server(settings) as (url, services):
            yield RunningServer(url, services, model, adapter_folders)


class Leaver:
    """A client that sends what it likes, and leaves by closing or by resetting its connection."""

    def __init__(self, server: RunningServer) -> None:
        address = httpx.URL(server.base_url)
        self.server = server
        self.stats = server.services.engine.stats
        self._socket = socket.create_connection((address.host, address.port or 80), timeout=60)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def ask(self, **body: Any) -> None:
        self.send(request_of({"model": "mlp", "prompt": "A", **LONG, **body}))

    def wait_for(self, text: bytes) -> None:
        received = b""
        while text not in received:
            part = self._socket.recv(1 << 16)
            assert part, received
            received += part

    def leave(self, reset: bool) -> None:
        if reset:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


def request_of(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def in_the_head(client: Leaver) -> None:
    client.send(request_of(SHORT)[:40])


def in_the_body(client: Leaver) -> None:
    client.send(request_of(SHORT)[:-10])


def in_an_upload(client: Leaver) -> None:
    head = "POST /v1/adapters HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x"
    form = '--x\r\nContent-Disposition: form-data; name="weights"; filename="w"\r\n\r\n'
    data = f"{head}\r\nContent-Length: 5000000\r\n\r\n{form}".encode()
    client.send(data + bytes(2_000_000))


def in_the_queue(client: Leaver) -> None:
    client.ask()
    assert eventually(lambda: client.stats().waiting == 1)


def in_the_prompt(client: Leaver) -> None:
    client.ask(prompt=[5] * PROMPT_TOKENS)
    assert eventually(lambda: client.stats().running == 1)


def in_the_stream(client: Leaver) -> None:
    client.ask(stream=True)
    client.wait_for(b"data: ")


def before_a_whole_answer(client: Leaver) -> None:
    before = client.stats().generated_tokens
    client.ask()
    assert eventually(lambda: client.stats().generated_tokens > before)


def after_the_last_token(client: Leaver) -> None:
    client.ask(stream=True, max_tokens=3)
    client.wait_for(b'"finish_reason":"length"')


MOMENTS: dict[str, Callable[[Leaver], None]] = {
    "before the head": lambda _: None,
    "in the head": in_the_head,
    "in the body": in_the_body,
    "in an upload": in_an_upload,
    "in the prompt": in_the_prompt,
    "in the stream": in_the_stream,
    "before a whole answer": before_a_whole_answer,
    "after the last token": after_the_last_token,
}


@pytest.mark.fault(
    "network",
    "A client leaves before, or within, the head of its request",
    by="a raw socket, closed or reset",
    promise="Nothing of it stays, and the next request is answered as ever.",
    case="head",
)
@pytest.mark.fault(
    "network",
    "A client leaves within its body",
    by="a raw socket, closed or reset",
    promise="Nothing of it stays, and the next request is answered as ever.",
    case="in the body",
)
@pytest.mark.fault(
    "network",
    "A client leaves within an upload",
    by="a raw socket, closed or reset",
    promise="No adapter and no file of it stays.",
    case="in an upload",
)
@pytest.mark.fault(
    "network",
    "A client leaves while its prompt is computed",
    by="a raw socket, closed or reset",
    promise="No token is computed for it; its row, cache and adapter are free.",
    case="in the prompt",
)
@pytest.mark.fault(
    "network",
    "A client leaves its stream",
    by="a raw socket, closed or reset",
    promise="Its row, cache and adapter are free within steps.",
    case="in the stream",
)
@pytest.mark.fault(
    "network",
    "A client leaves while its whole answer is computed",
    by="a raw socket, closed or reset",
    promise="Its row, cache and adapter are free within steps.",
    case="before a whole answer",
)
@pytest.mark.fault(
    "network",
    "A client leaves after its last token, before the end of the stream",
    by="a raw socket, closed or reset",
    promise="Its tokens count as used; nothing of it stays.",
    case="after the last token",
)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_of_a_client_that_leaves_nothing_stays(
    server: RunningServer, moment: str, reset: bool
) -> None:
    with httpx.Client(base_url=server.base_url, timeout=60) as others:
        alone = others.post(COMPLETIONS, json=SHORT).json()["choices"]
        before, used = server.services.engine.stats().generated_tokens, used_by(others, "mlp")
        client = Leaver(server)
        MOMENTS[moment](client)
        client.leave(reset)

        assert eventually(lambda: at_rest(server) and nothing_is_staged(server))
        generated = server.services.engine.stats().generated_tokens - before
        assert generated < LONG["max_tokens"] / 2
        if moment not in ("in the stream", "before a whole answer", "after the last token"):
            assert generated == 0
        if moment == "after the last token":
            assert eventually(lambda: used_by(others, "mlp") == used + 3)
        assert others.post(COMPLETIONS, json=SHORT).json()["choices"] == alone


@pytest.mark.fault(
    "network",
    "A client leaves while its request waits in the queue",
    by="a raw socket, closed or reset",
    promise="Its place is free; what runs goes on.",
)
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_client_that_leaves_the_queue_frees_its_place_and_what_runs_goes_on(
    server: RunningServer, reset: bool
) -> None:
    with httpx.Client(base_url=server.base_url, timeout=60) as others:
        body = SHORT | LONG | {"stream": True}
        with (
            others.stream("POST", COMPLETIONS, json=body) as answer,
            closing(events(answer)) as chunks,
        ):
            next(chunks)
            client = Leaver(server)
            in_the_queue(client)
            client.leave(reset)
            assert eventually(lambda: client.stats().waiting == 0)
            assert client.stats().running == 1
            assert [next(chunks) for _ in range(10)]
    assert eventually(lambda: at_rest(server))


def used_by(client: httpx.Client, adapter: str) -> int:
    """The tokens of an adapter's answers."""
    rows = client.get("/v1/usage", params=ALL_USAGE | {"adapter": adapter}).json()["data"]
    return sum(row["completion_tokens"] for row in rows)


def nothing_is_staged(server: RunningServer) -> bool:
    store = Path(server.services.settings.adapters_dir)
    return not list((store / "staging").iterdir())
