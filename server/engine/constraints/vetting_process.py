"""Runs `vetting` as processes of their own, so that no grammar costs more than its limits."""

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from infuse.server.engine.constraints import vetting
from infuse.server.engine.constraints.vetting import GrammarKind

TOO_BUSY = "takes too long to compile"
"""The problem of a grammar that a busy machine could not compile in time."""
TOO_MUCH = "takes too much time or memory to compile"
"""The problem of a grammar that met a limit."""
REST = 19
"""While the model is in use, a slow grammar rests so many times as long as it is vetted for
(docs/decisions/0062-rests.md)."""
_SLICE = 0.005
"""Seconds that a slow grammar is vetted for, between rests."""
_IDLE = 0.3
"""Seconds without a request after which the model is not in use."""


class Slow(Exception):
    """A grammar takes longer than `vetting.QUICK_SECONDS` to compile."""


class Vetting:
    """Compiles grammars in processes that are forked from one, which the first grammar starts.

    It ends with the object or the server, and they with it.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        """Grammars are vetted in several event loops."""
        self._forks: _Forks | None = None

    async def vet(self, kind: GrammarKind, text: str) -> str:
        """Compile a grammar, and return why it is refused. Empty: it is accepted.

        The process is killed if the caller is cancelled. Raises Slow, and MemoryError if no process
        can be started.
        """
        async with self._process() as process:
            said = await process.answer(kind, text, gives_up_if_slow=True)
        if said == TOO_MUCH:
            raise Slow
        return said

    async def vet_slowly(self, kind: GrammarKind, text: str, is_busy: Callable[[], bool]) -> str:
        """As `vet`, but at a low priority, and resting most of the time while the model is in use.
        `is_busy`: whether the model computes now."""
        async with self._process() as process:
            resting = asyncio.create_task(process.rest(is_busy))
            try:
                return await process.answer(kind, text, gives_up_if_slow=False)
            finally:
                resting.cancel()

    @asynccontextmanager
    async def _process(self) -> "AsyncIterator[_Process]":
        """A process that vets one grammar. It has ended, or been killed, when the context ends."""
        reader, writer = await asyncio.open_unix_connection(sock=self._fork())
        try:
            number = b""
            with suppress(TimeoutError):
                async with asyncio.timeout(vetting.WALL_SECONDS):
                    number = await reader.readline()
            if not number:
                raise MemoryError("no process that vets grammars can be started")
            process = _Process(int(number), reader, writer)
            try:
                yield process
            finally:
                process.kill()
        finally:
            writer.close()

    def _fork(self) -> socket.socket:
        """Fork a process, and return the socket that leads to it."""
        with self._mutex:
            if self._forks is None or not self._forks.runs:
                self._forks = _Forks()
            return self._forks.fork()


class _Forks:
    """The process that others are forked from: see `vetting.main`."""

    def __init__(self) -> None:
        self._control, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-I", vetting.__file__],
                stdin=its.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        weakref.finalize(self, _end, self._control, self._process)

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> socket.socket:
        ours, its = socket.socketpair()
        with its, suppress(OSError):
            # Where it has just ended, nothing answers on this socket.
            socket.send_fds(self._control, [b"1"], [its.fileno()])
        return ours


def _end(control: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    control.close()
    process.kill()
    process.wait()


class _Process:
    """That vets one grammar."""

    def __init__(
        self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._number = number
        self._reader = reader
        self._writer = writer

    async def answer(self, kind: GrammarKind, text: str, *, gives_up_if_slow: bool) -> str:
        self._writer.write(json.dumps([kind, text, gives_up_if_slow]).encode() + b"\n")
        try:
            async with asyncio.timeout(vetting.WALL_SECONDS):
                said = await self._reader.read()
        except TimeoutError:
            return TOO_BUSY
        except ConnectionError:
            said = b""
        return str(json.loads(said)) if said else TOO_MUCH

    async def rest(self, is_busy: Callable[[], bool]) -> None:
        """Stop the process again and again while the model is in use, until this is cancelled."""
        in_use = _InUse(is_busy, -math.inf)
        while True:
            await asyncio.sleep(_SLICE)
            if in_use():
                self._send(signal.SIGSTOP)
                await asyncio.sleep(REST * _SLICE)
                self._send(signal.SIGCONT)

    def kill(self) -> None:
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if not self._reader.at_eof():
            # Otherwise it has ended, and its number may be another's.
            with suppress(ProcessLookupError):
                os.kill(self._number, number)


class _InUse:
    """Whether the model is in use: it computed within the last `_IDLE` seconds."""

    def __init__(self, is_busy: Callable[[], bool], last: float) -> None:
        """`is_busy`: whether it computes now. `last`: when it did, on `time.monotonic`."""
        self._is_busy = is_busy
        self._last = last

    def __call__(self) -> bool:
        now = time.monotonic()
        if self._is_busy():
            self._last = now
        return now < self._last + _IDLE


async def rest(seconds: float, is_busy: Callable[[], bool]) -> None:
    """Wait so long, or until the model is not in use. `is_busy`: whether it computes now."""
    now = time.monotonic()
    end, in_use = now + seconds, _InUse(is_busy, now)
    while time.monotonic() < end and in_use():
        await asyncio.sleep(_SLICE)
