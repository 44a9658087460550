"""What the proxy tells the router of a request."""

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from starlette.types import Message, Receive, Scope, Send

from infuse.server.on_ray.affinity import MERGES, Affinity, affinity_of

SYSTEM = {"role": "system", "content": "Answer briefly. " * 40}


def of(**body: Any) -> tuple[str, str]:
    adapter, _, beginning = affinity_of(json.dumps(body).encode()).partition("-")
    return adapter, beginning


def chat(*texts: str, model: str = "a") -> dict[str, Any]:
    messages = [{"role": "user", "content": text} for text in texts]
    return {"model": model, "messages": [SYSTEM, *messages]}


def test_a_conversation_keeps_its_affinity_as_it_grows() -> None:
    assert of(**chat("Hello")) == of(**chat("Hello", "And then?", "Go on."))


def test_a_conversation_of_items_keeps_its_affinity_as_it_grows() -> None:
    body = {"model": "a", "instructions": "Answer briefly. " * 40}
    items = [{"role": "user", "content": "Hello"}, {"type": "function_call", "name": "look"}]

    assert of(**body, input=items) == of(**body, input=[*items, *items])
    assert of(**body, input=items) != of(model="a", instructions="Be kind.", input=items)
    assert of(model="a", input="An order") != of(model="a", input="The order")


def test_prompts_that_begin_alike_have_one_affinity() -> None:
    long = "The order arrived. " * 40

    assert of(model="a", prompt=f"{long} A") == of(model="a", prompt=f"{long} B", max_tokens=3)
    assert of(model="a", prompt=[7] * 600) == of(model="a", prompt=[7] * 601)
    assert of(model="a", prompt="An order") != of(model="a", prompt="The order")


def test_adapters_and_mixtures_have_affinities_of_their_own() -> None:
    mixtures = [[{"name": "a"}], [{"name": "a"}, {"name": "b"}]]
    bodies = [{"model": "a"}, {"model": "b"}, *({"model": "x", "adapters": m} for m in mixtures)]
    found = [of(prompt="The order", **body) for body in bodies]

    assert len({adapter for adapter, _ in found}) == len(bodies)
    assert len({beginning for _, beginning in found}) == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"\xff", b'{"messages": [1, {}]}'])
def test_any_body_is_left_for_the_server_to_refuse(body: bytes) -> None:
    affinity_of(body)


class Asked:
    """An application that keeps what it is asked, and reads the body."""

    async def __call__(self, scope: Scope, receive: Receive, _: Send) -> None:
        self.session = dict(scope["headers"]).get(b"x-session-id", b"").decode()
        self.messages = []
        while not self.messages or self.messages[-1].get("more_body"):
            self.messages.append(await receive())


def ask(path: str, messages: list[Message], method: str = "POST", client: str = "") -> Asked:
    asked = Asked()
    headers = [(b"x-session-id", client.encode())] if client else []
    scope = {"type": "http", "path": path, "method": method, "headers": headers}

    async def come() -> AsyncIterator[Message]:
        for message in messages:
            yield message

    coming = come()

    async def send(_: Message) -> None: ...

    anyio.run(Affinity(asked), scope, coming.__anext__, send)
    return asked


def parts(body: bytes, size: int) -> list[Message]:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return [
        {"type": "http.request", "body": piece, "more_body": number < len(pieces) - 1}
        for number, piece in enumerate(pieces)
    ]


def test_a_body_is_passed_on_as_it_came() -> None:
    body = json.dumps(chat("Hello")).encode()
    asked = ask("/v1/chat/completions", parts(body, 100))

    assert asked.messages == parts(body, 100)
    assert asked.session == affinity_of(body)


@pytest.mark.parametrize("path", ["/v1/messages", "/api/chat", "/api/generate", "/v1/rank"])
def test_every_way_to_generate_has_an_affinity(path: str) -> None:
    body = json.dumps(chat("Hello") | {"prompt": "Hello"}).encode()

    assert ask(path, parts(body, 100)).session == affinity_of(body) != ""


def test_a_system_prompt_beside_the_messages_is_part_of_their_beginning() -> None:
    asked = {"model": "a", "messages": [{"role": "user", "content": "Hello"}]}

    assert of(**asked, system="Be brief.") != of(**asked, system="Be kind.")
    assert of(**asked, system="x" * 600) == of(**asked | {"messages": []}, system="x" * 600)


def test_a_body_that_is_too_large_to_read_ahead_is_passed_on_without_an_affinity() -> None:
    messages = parts(json.dumps({"model": "a", "prompt": "x" * (3 << 20)}).encode(), 1 << 16)
    asked = ask("/v1/completions", messages)

    assert asked.messages == messages
    assert asked.session == ""


def test_requests_about_merges_go_where_merges_are() -> None:
    for path in ("/v1/merges", "/v1/merges/merge-1/archive"):
        assert ask(path, parts(b"{}", 9), "GET").session == MERGES


def test_no_client_chooses_its_replica() -> None:
    assert ask("/v1/adapters", parts(b"{}", 9), client=MERGES).session == ""
