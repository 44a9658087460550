"""A client of OpenAI's completions that takes little from the server's cores, on which it runs.

What it took there would count as the server's: it notes what it reads and when, and parses it once
the round has ended.
"""

import asyncio
import itertools
import json
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from urllib.parse import urlsplit

import uvloop

from benchmarks.engines import Answer, EngineFailed, Request, Round

BASE = "base"
"""What the base is called in requests."""
_ROUND_SECONDS = 600
_MUCH = 65_536
"""Bytes."""


def ask(
    url: str | Sequence[str],
    requests: Sequence[Request],
    in_flight: int | None = None,
    *,
    elsewhere: bool = False,
    key: str = "",
    **fields: Any,
) -> Round:
    """Several servers are asked in turn. `fields` are added to every request's body. `elsewhere`:
    as from another machine, the client takes next to nothing from the server's cores: it leaves
    what is streamed with the kernel until there is much of it, and of an answer's times only the
    last is right.

    Raises EngineFailed.
    """
    urls = [url] if isinstance(url, str) else url
    asked = list(zip(itertools.cycle(urls), requests))
    bodies = [_request(url, each, key, fields) for url, each in asked]
    return uvloop.run(_ask(asked, bodies, in_flight, _MUCH if elsewhere else 1))


async def _ask(
    asked: Sequence[tuple[str, Request]],
    bodies: Sequence[bytes],
    in_flight: int | None,
    at_once: int,
) -> Round:
    places = nullcontext() if in_flight is None else asyncio.Semaphore(in_flight)
    began = time.perf_counter()

    async def exchange(url: str, request: Request, body: bytes) -> "_Exchange":
        await asyncio.sleep(max(0.0, began + request.at - time.perf_counter()))
        async with places:
            made = _Exchange(body)
            await made.on(url, at_once)
        return made

    try:
        async with asyncio.timeout(_ROUND_SECONDS):
            exchanges = await asyncio.gather(
                *(exchange(*each, body) for each, body in zip(asked, bodies, strict=True))
            )
    except (OSError, TimeoutError) as error:
        raise EngineFailed(f"over HTTP: {type(error).__name__}: {error}") from error
    answers = [_answer(each, began) for each in exchanges]
    return Round(began, max(each.last for each in answers), answers)


class _Exchange(asyncio.Protocol):
    """A request on a connection of its own, and what came back: until the server ends it."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._ended = asyncio.get_running_loop().create_future()
        self._received: list[tuple[bytes, float]] = []
        self.arrived = time.perf_counter()

    async def on(self, url: str, at_once: int) -> None:
        """Woken for so many bytes, or the end. Raises OSError."""
        address = urlsplit(url)
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: self, address.hostname, address.port
        )
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, at_once)
        transport.write(self._request)
        await self._ended

    def data_received(self, data: bytes) -> None:
        self._received.append((data, time.perf_counter()))

    def connection_lost(self, error: Exception | None) -> None:
        if self._ended.done():  # The round has taken too long.
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    def lines(self) -> Iterator[tuple[bytes, float]]:
        """Each, and when its end was read."""
        begun = b""
        for data, at in self._received:
            *whole, begun = (begun + data).split(b"\n")
            yield from ((line, at) for line in whole)
        if begun:
            yield begun, at


def _request(url: str, request: Request, key: str, fields: Mapping[str, Any]) -> bytes:
    body = json.dumps(
        {
            "model": request.adapter or BASE,
            "prompt": request.prompt,
            "max_tokens": request.tokens_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        | fields
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        + (f"Authorization: Bearer {key}\r\n\r\n" if key else "\r\n")
    )
    return head.encode() + body


def _answer(exchange: _Exchange, began: float) -> Answer:
    """Raises EngineFailed for anything but the whole answer that was asked for."""
    arrived = exchange.arrived - began
    lines = list(exchange.lines())
    status = lines[0][0].split()[1] if lines else b"nothing"
    if status != b"200":
        raise EngineFailed(f"the server answered {status.decode()}: {lines[-1:]}")
    events = [(json.loads(line[6:]), at) for line, at in lines if line.startswith(b"data: {")]
    choices = [(choice, at) for event, at in events for choice in event.get("choices", ())]
    text = "".join(choice["text"] for choice, _ in choices)
    whole = choices and choices[-1][0]["finish_reason"] == "length"
    if not whole or "error" in events[-1][0]:
        raise EngineFailed(f"a stream ended early: {lines[-1:]}")
    return Answer(text, arrived, choices[-1][1] - began, choices[0][1] - began)
