"""Tells Serve's router, by a header, which adapter a request names and how its prompt begins.

Serve's router sees the headers of a request and not its body. The HTTP proxy, in whose process the
router is, runs this middleware before it: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names
`middlewares`.
"""

import asyncio
import hashlib
from collections.abc import Mapping
from typing import Any

import pydantic_core
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CALLBACK = f"{__name__}:middlewares"
MERGES = "merges"
"""The affinity of requests about merges: they are jobs of one replica."""
_HEADER = b"x-session-id"
"""What Serve hands its router as a request's session."""
_GENERATION = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/rank",
    "/api/chat",
    "/api/generate",
)
_MERGES = "/v1/merges"
_MOST_BYTES = 1 << 20
_SECONDS = 5.0
"""A body that is larger, or takes longer, goes on without an affinity."""
_BEGINNING = 512
"""Characters, or tokens, of a prompt by which it is told from others: they bound the work, and a
conversation keeps its beginning as it grows."""


def middlewares() -> list[Middleware]:
    return [Middleware(Affinity)]


class Affinity:
    """ASGI middleware that replaces the header. It reads the bodies of generation requests ahead,
    and passes them on as they came."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        affinity = ""
        path = str(scope["path"])
        if path == _MERGES or path.startswith(f"{_MERGES}/"):
            affinity = MERGES
        elif scope["method"] == "POST" and path in _GENERATION:
            messages = await _read_ahead(receive)
            affinity = affinity_of(b"".join(message.get("body", b"") for message in messages))
            receive = _replayed(messages, receive)
        headers = [(name, value) for name, value in scope["headers"] if name != _HEADER]
        if affinity:
            headers.append((_HEADER, affinity.encode()))
        await self._app({**scope, "headers": headers}, receive, send)


async def _read_ahead(receive: Receive) -> list[Message]:
    """The messages of a body, up to its end or to a bound."""
    messages: list[Message] = []
    size, more = 0, True
    try:
        async with asyncio.timeout(_SECONDS):
            while more and size <= _MOST_BYTES:
                message = await receive()
                messages.append(message)
                size += len(message.get("body", b""))
                more = bool(message.get("more_body", False))
    except TimeoutError:
        pass
    return messages


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    ahead = iter(messages)

    async def replayed() -> Message:
        message = next(ahead, None)
        return await receive() if message is None else message

    return replayed


def affinity_of(body: bytes) -> str:
    """Two digests, of the adapter and of the prompt's beginning: `<adapter>-<beginning>`. Empty
    where the body is not whole or not JSON, which is for the replica to say."""
    try:
        parsed = pydantic_core.from_json(body)
    except ValueError:
        return ""
    if not isinstance(parsed, dict):
        return ""
    adapter = [parsed.get("model"), parsed.get("adapters")]
    return f"{_digest(adapter)}-{_digest(_beginning(parsed))}"


def _beginning(body: Mapping[str, Any]) -> str:
    messages = body.get("messages", body.get("input"))
    if isinstance(messages, list):
        shown = [[each.get("role"), each.get("content")] for each in messages[:8] if _is_map(each)]
        return _json([body.get("system", body.get("instructions")), shown])[:_BEGINNING]
    prompt = body.get("prompt", body.get("input"))
    return _json(prompt[:_BEGINNING] if isinstance(prompt, str | list) else prompt)[:_BEGINNING]


def _is_map(value: object) -> bool:
    return isinstance(value, dict)


def _json(value: object) -> str:
    return pydantic_core.to_json(value).decode()


def _digest(value: object) -> str:
    return hashlib.blake2b(pydantic_core.to_json(value), digest_size=8).hexdigest()
