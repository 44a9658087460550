"""The bridge from the engine's thread to the event loop."""

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Protocol

from infuse.server.engine.request import Output


class Receiver(Protocol):
    """Takes the outputs of the requests that it was registered for, on the event loop."""

    def take(self, output: Output) -> None: ...


class Stream:
    """The outputs of one group of requests, in order, until they are read. Belongs to the event
    loop."""

    def __init__(self, request_ids: Iterable[str]) -> None:
        self._open = set(request_ids)
        self._outputs: list[Output] = []
        self._reader: asyncio.Future[None] | None = None
        self._reader_waits_for_all = False

    @property
    def finished(self) -> bool:
        """Whether every request has ended."""
        return not self._open

    @property
    def unread(self) -> int:
        """How many outputs wait while the reader is busy elsewhere."""
        return len(self._outputs) if self._reader is None else 0

    def take(self, output: Output) -> None:
        self._outputs.append(output)
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
        if self._reader is not None and not self._reader.done():
            if self._reader_waits_for_all and self._open:
                return
            self._reader.set_result(None)

    async def wait_for_all(self) -> None:
        """Return when every request has ended. The reader wakes once, not at every token."""
        if self._open:
            self._reader_waits_for_all = True
            await self._sleep()

    async def next(self) -> list[Output]:
        """All unread outputs, at least one; none when every request has ended.

        One call for all outputs of a step, not an iterator: this runs for every token.
        """
        if not self._outputs and self._open:
            await self._sleep()
        taken, self._outputs = self._outputs, []
        return taken

    async def _sleep(self) -> None:
        assert self._reader is None, "a stream has one reader"
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None
            self._reader_waits_for_all = False

    def end(self) -> None:
        """Expect no more outputs: a reader waits no longer."""
        self._open = set()
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


class Streams:
    """Knows the receiver of each request's outputs. Belongs to one event loop: only `deliver` may
    be called by another thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        """The loop that runs the receivers; None before the first."""
        self._receivers: dict[str, Receiver] = {}

    def open(self, request_ids: Iterable[str], receiver: Receiver) -> None:
        """Give the outputs of these requests to `receiver`, until each has ended. Call this before
        the requests are submitted."""
        self._loop = asyncio.get_running_loop()
        for request_id in request_ids:
            assert request_id not in self._receivers, f"{request_id} has a receiver already"
            self._receivers[request_id] = receiver

    def deliver(self, outputs: list[Output]) -> None:
        """Hand one step's outputs over; wakes the loop once. Called on the engine's thread."""
        if self._loop is None:
            return
        # A closed loop has no receivers left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def close(self, request_ids: Iterable[str]) -> None:
        """Drop what still comes for these requests. Does not cancel them."""
        for request_id in request_ids:
            self._receivers.pop(request_id, None)

    def __len__(self) -> int:
        """How many requests have a receiver."""
        return len(self._receivers)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            receiver = self._receivers.get(output.request_id)
            if receiver is None:
                continue
            if output.finish_reason is not None:
                del self._receivers[output.request_id]
            receiver.take(output)
