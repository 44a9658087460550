"""Streams of both generation endpoints on a real server, and the bridge beneath them."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from infuse.server.engine.request import FinishReason, Output
from infuse.server.streams import Stream, Streams
from tests.api.conftest import RunningServer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "The order arrived"},
    CHAT: {"messages": [{"role": "user", "content": "Where is my order?"}]},
}
Chunk = dict[str, Any]


@pytest.fixture(scope="module")
def base(server: RunningServer) -> str:
    return server.services.model_name


def body_of(path: str, model: str, **more: Any) -> dict[str, Any]:
    body = {"model": model, "temperature": 0, "max_tokens": 12, "ignore_eos": True}
    return body | PROMPTS[path] | more


def stream(client: httpx.Client, path: str, **body: Any) -> list[Chunk]:
    """The events of a stream that ends as it should."""
    with client.stream("POST", path, json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def text_of(chunk_choice: Chunk) -> str:
    if "delta" in chunk_choice:
        return str(chunk_choice["delta"].get("content", ""))
    return str(chunk_choice["text"])


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        threading.Event().wait(0.01)
    return True


def at_rest(server: RunningServer) -> bool:
    services = server.services
    engine, registry = services.engine.stats(), services.registry.stats()
    counts = (engine.running, engine.waiting, engine.kv_tokens_used)
    return not any((*counts, registry.leases, registry.pinned, len(services.streams)))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("adapted", [False, True])
def test_a_stream_brings_what_a_whole_answer_brings(
    client: httpx.Client, base: str, adapter_folders: dict[str, Path], path: str, adapted: bool
) -> None:
    body = body_of(
        path, next(iter(adapter_folders)) if adapted else base, n=2, seed=3, temperature=1
    )
    whole = client.post(path, json=body).json()

    chunks = stream(client, path, **body)

    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"]]
        parts = [part for part in parts if part["index"] == choice["index"]]
        expected = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert "".join(map(text_of, parts)) == expected
        assert len(parts) > 3
        assert parts[-1]["finish_reason"] == choice["finish_reason"] == "length"
        assert all(part["finish_reason"] is None for part in parts[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["system_fingerprint"] for chunk in chunks} == {whole["system_fingerprint"]}
    assert all("usage" not in chunk for chunk in chunks)


def test_a_chat_stream_opens_with_the_role_and_closes_empty(
    client: httpx.Client, base: str
) -> None:
    chunks = stream(client, CHAT, **body_of(CHAT, base))

    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert chunks[-1]["choices"][0]["delta"] == {}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_usage_comes_last_where_it_is_asked_for(client: httpx.Client, base: str, path: str) -> None:
    body = body_of(path, base, n=2)
    whole = client.post(path, json=body).json()

    *chunks, last = stream(client, path, **body, stream_options={"include_usage": True})

    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert all(chunk["choices"] for chunk in chunks)


def test_streamed_logprobs_are_the_whole_ones_in_parts(client: httpx.Client, base: str) -> None:
    body = body_of(COMPLETIONS, base, logprobs=2, echo=True)
    whole = client.post(COMPLETIONS, json=body).json()["choices"][0]["logprobs"]

    chunks = stream(client, COMPLETIONS, **body)

    for field, values in whole.items():
        parts = [value for chunk in chunks for value in chunk["choices"][0]["logprobs"][field]]
        if field in ("tokens", "text_offset"):
            assert parts == values
        else:
            assert parts[0] is values[0] is None
            assert parts[1:] == [pytest.approx(value, abs=1e-4) for value in values[1:]]


def test_streamed_chat_logprobs_name_every_token(client: httpx.Client, base: str) -> None:
    body = body_of(CHAT, base, logprobs=True, top_logprobs=1)
    whole = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]

    chunks = stream(client, CHAT, **body)

    scored = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    parts = [token for part in scored if part is not None for token in part["content"]]
    assert [token["bytes"] for token in parts] == [token["bytes"] for token in whole]


def test_a_stop_string_never_shows_in_a_stream(client: httpx.Client, base: str) -> None:
    body = body_of(COMPLETIONS, base)
    text = client.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    stop = text[4:6]

    chunks = stream(client, COMPLETIONS, **body, stop=[stop])

    parts = [chunk["choices"][0] for chunk in chunks]
    assert "".join(map(text_of, parts)) == text[: text.index(stop)]
    assert parts[-1]["finish_reason"] == "stop"


def test_a_stream_names_the_revision_that_answers(
    client: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    name = next(iter(adapter_folders))

    with client.stream("POST", CHAT, json=body_of(CHAT, name, stream=True)) as response:
        assert response.headers["infuse-adapter"] == f"{name}@1"
        response.read()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_fault_before_the_first_byte_is_an_http_error(
    client: httpx.Client, base: str, path: str
) -> None:
    unknown = client.post(path, json=body_of(path, "nobody", stream=True))
    too_long = client.post(path, json=body_of(path, base, stream=True, max_tokens=10**6))

    assert unknown.status_code == 404
    assert too_long.status_code == 400


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_leaves_a_stream_frees_its_rows(
    client: httpx.Client, server: RunningServer, adapter_folders: dict[str, Path], path: str
) -> None:
    body = body_of(path, next(iter(adapter_folders)), n=3, stream=True, max_tokens=200)

    with client.stream("POST", path, json=body) as response:
        lines = response.iter_lines()  # Held: a discarded generator closes the stream.
        next(lines)
        assert not at_rest(server)

    assert eventually(lambda: at_rest(server))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_does_not_wait_for_its_answer_frees_its_rows(
    server: RunningServer, adapter_folders: dict[str, Path], path: str
) -> None:
    steps = server.services.engine.stats().steps
    body = body_of(path, next(iter(adapter_folders)), n=4, max_tokens=200)

    with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=server.base_url) as impatient:
        impatient.post(path, json=body, timeout=0.05)

    assert eventually(lambda: at_rest(server))
    assert server.services.engine.stats().steps - steps < 200


def output(request_id: str, text: str = "", reason: FinishReason | None = None) -> Output:
    return Output(request_id=request_id, text=text, finish_reason=reason)


def opened_stream(streams: Streams, *request_ids: str) -> Stream:
    stream = Stream(request_ids)
    streams.open(request_ids, stream)
    return stream


async def all_of(opened: Stream) -> list[Output]:
    outputs = []
    while come := await opened.next():
        outputs += come
    return outputs


def test_the_bridge_carries_a_threads_outputs_in_order() -> None:
    async def scene() -> list[str]:
        streams = Streams()
        opened = opened_stream(streams, "a", "b")

        def model_thread() -> None:
            streams.deliver([output("a", "1"), output("b", "2"), output("stranger", "x")])
            streams.deliver([output("b", "3", FinishReason.STOP)])
            streams.deliver([output("b", "late"), output("a", "4", FinishReason.LENGTH)])

        thread = threading.Thread(target=model_thread)
        thread.start()
        texts = [part.text for part in await all_of(opened)]
        thread.join()
        assert len(streams) == 0
        return texts

    assert asyncio.run(scene()) == ["1", "2", "3", "4"]


def test_a_waiting_reader_wakes_when_all_have_ended() -> None:
    async def scene() -> None:
        streams = Streams()
        opened = opened_stream(streams, "a", "b")
        waiting = asyncio.create_task(opened.wait_for_all())
        streams.deliver([output("a", "1"), output("a", "2", FinishReason.STOP)])
        await asyncio.sleep(0.01)
        assert not waiting.done()
        streams.deliver([output("b", "3", FinishReason.STOP)])
        await asyncio.wait_for(waiting, timeout=60)
        assert [part.text for part in await opened.next()] == ["1", "2", "3"]

    asyncio.run(scene())


def test_a_closed_stream_takes_nothing_more() -> None:
    async def scene() -> None:
        streams = Streams()
        opened = opened_stream(streams, "a")
        streams.close(["a"])
        opened.end()
        streams.deliver([output("a", "1")])
        assert await opened.next() == []
        assert len(streams) == 0

    asyncio.run(scene())


def test_outputs_after_the_loop_has_ended_are_dropped() -> None:
    streams = Streams()

    async def open_one() -> None:
        opened_stream(streams, "a")

    asyncio.run(open_one())

    streams.deliver([output("a", "1")])
