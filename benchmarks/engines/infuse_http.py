"""Infuse as a user runs it: `infuse serve` in a process of its own, asked over HTTP.

The client computes on the server's own cores, and what it takes there would count as the server's:
it notes what it reads and when, and parses it once the round has ended.
"""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import psutil
import uvloop

from benchmarks.engines import Answer, EngineFailed, Request, Round

BASE = "base"
"""What the base is called in requests."""
_STARTUP_SECONDS = 300
_ROUND_SECONDS = 600


class ServerProcess:
    """`infuse serve` on a free port, until the block ends."""

    def __init__(self, log: Path, *flags: object) -> None:
        self._log = log
        self._flags = [str(flag) for flag in flags]
        self._process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.start_seconds = 0.0
        """From the command to the first moment that it answers."""

    @property
    def group(self) -> int:
        assert self._process is not None, "the server has not been started"
        return self._process.pid

    def start(self) -> None:
        command = [
            str(Path(sys.executable).with_name("infuse")),
            "serve",
            "--port",
            "0",
            *self._flags,
        ]
        started = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        while not (address := re.search(r"answers on (http://\S+)", self._log.read_text())):
            late = time.perf_counter() - started > _STARTUP_SECONDS
            if self._process.poll() is not None or late:
                last = self._log.read_text().strip().splitlines()[-1:]
                raise EngineFailed(f"the server did not start: {''.join(last)}")
            time.sleep(0.05)
        self.start_seconds = time.perf_counter() - started
        self.url = address[1]

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def memory(self) -> dict[str, int]:
        """Bytes: the plan by part, what the process holds in memory, and the most it ever held."""
        lines = httpx.get(f"{self.url}/metrics").text
        plan = re.findall(r'infuse_memory_bytes\{part="(\w+)"\} (\S+)', lines)
        assert self._process is not None
        process = psutil.Process(self._process.pid)
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
        assert peak is not None
        return {part: int(float(size)) for part, size in plan} | {
            "resident": process.memory_info().rss,
            "peak": int(peak[1]) * 1024,
        }


class InfuseHttp(ServerProcess):
    """The server as an engine. `stream`: read token by token, or the whole answer at once."""

    def __init__(self, name: str, log: Path, *flags: object, stream: bool = True) -> None:
        super().__init__(log, "--served-model-name", BASE, *flags)
        self.name = name
        self.stream = stream

    def run(
        self,
        requests: Sequence[Request],
        in_flight: int | None = None,
        *,
        stream: bool | None = None,
        **fields: Any,
    ) -> Round:
        """`fields` are added to every request's body."""
        streaming = self.stream if stream is None else stream
        bodies = [_request(self.url, each, streaming, fields) for each in requests]
        return uvloop.run(self._run(requests, bodies, in_flight))

    async def _run(
        self, requests: Sequence[Request], bodies: list[bytes], in_flight: int | None
    ) -> Round:
        places = nullcontext() if in_flight is None else asyncio.Semaphore(in_flight)
        began = time.perf_counter()

        async def exchange(request: Request, body: bytes) -> _Exchange:
            await asyncio.sleep(max(0.0, began + request.at - time.perf_counter()))
            async with places:
                made = _Exchange(body)
                await made.on(self.url)
            return made

        try:
            async with asyncio.timeout(_ROUND_SECONDS):
                exchanges = await asyncio.gather(
                    *(exchange(each, body) for each, body in zip(requests, bodies, strict=True))
                )
        except (OSError, TimeoutError) as error:
            raise EngineFailed(f"{self.name}: {type(error).__name__}: {error}") from error
        answers = [
            _answer(each, request, began) for each, request in zip(exchanges, requests, strict=True)
        ]
        return Round(began, max(each.last for each in answers), answers)


class _Exchange(asyncio.Protocol):
    """A request on a connection of its own, and what came back: until the server ends it."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._ended = asyncio.get_running_loop().create_future()
        self._received: list[tuple[bytes, float]] = []
        self.arrived = time.perf_counter()

    async def on(self, url: str) -> None:
        """Raises OSError."""
        address = urlsplit(url)
        transport, _ = await asyncio.get_running_loop().create_connection(
            lambda: self, address.hostname, address.port
        )
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


def _request(url: str, request: Request, stream: bool, fields: dict[str, Any]) -> bytes:
    body = json.dumps(
        {
            "model": request.adapter or BASE,
            "prompt": request.prompt,
            "max_tokens": request.tokens_out,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        | fields
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _answer(exchange: _Exchange, request: Request, began: float) -> Answer:
    """Raises EngineFailed for anything but the whole answer that was asked for."""
    arrived = exchange.arrived - began
    lines = list(exchange.lines())
    status = lines[0][0].split()[1] if lines else b"nothing"
    if status != b"200":
        raise EngineFailed(f"the server answered {status.decode()}: {lines[-1:]}")
    events = [(json.loads(line[6:]), at) for line, at in lines if line.startswith(b"data: {")]
    if events:
        choices = [(choice, at) for event, at in events for choice in event["choices"]]
        text = "".join(choice["text"] for choice, _ in choices)
        if "error" in events[-1][0] or choices[-1][0]["finish_reason"] != "length":
            raise EngineFailed(f"a stream ended early: {events[-1][0]}")
        return Answer(text, arrived, choices[-1][1] - began, choices[0][1] - began)
    text, last = next((line, at) for line, at in lines if line.startswith(b"{"))
    whole = json.loads(text)
    if whole["usage"]["completion_tokens"] != request.tokens_out:
        raise EngineFailed(f"an answer ended early: {whole}")
    return Answer(whole["choices"][0]["text"], arrived, last - began)
