"""The bridge from the engine's thread to the event loop."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from server.engine.request import Output


class Stream:
    """What the engine says about one group of requests, in order.

    Belongs to the event loop. `observe` sees an output the moment it arrives, before anyone reads
    it.
    """

    def __init__(
        self, streams: "Streams", request_ids: Iterable[str], observe: Callable[[Output], None]
    ) -> None:
        self._streams = streams
        self._open = set(request_ids)
        self._observe = observe
        self._outputs: list[Output] = []
        self._reader: asyncio.Future[None] | None = None
        self._reader_waits_for_all = False

    @property
    def finished(self) -> bool:
        return not self._open

    @property
    def unread(self) -> int:
        """How many outputs lie there while the reader is busy elsewhere."""
        return len(self._outputs) if self._reader is None else 0

    def push(self, output: Output) -> None:
        self._observe(output)
        self._outputs.append(output)
        if output.finish_reason is not None:
            self._open.discard(output.request_id)
        if self._reader is not None and not self._reader.done():
            if self._reader_waits_for_all and self._open:
                return
            self._reader.set_result(None)

    async def wait_for_all(self) -> None:
        """Return when every request has ended; waking the reader once, not at every token."""
        if self._open:
            self._reader_waits_for_all = True
            await self._sleep()

    async def next(self) -> list[Output]:
        """All that has come since the last call, at least one; none when every request has ended.

        A call for all of a step, and not an iterator: this is done for every token.
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

    def close(self) -> None:
        """Take no more outputs. Does not cancel the requests."""
        self._streams.forget(self._open)
        self._open = set()


class Streams:
    """All open streams of one event loop. Only `deliver` may be called from another thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._by_request: dict[str, Stream] = {}

    def open(self, *request_ids: str, observe: Callable[[Output], None] = lambda _: None) -> Stream:
        """A stream of these requests' outputs. Open it before the requests are submitted."""
        stream = Stream(self, request_ids, observe)
        for request_id in request_ids:
            assert request_id not in self._by_request, f"{request_id} has a stream already"
            self._by_request[request_id] = stream
        return stream

    def deliver(self, outputs: list[Output]) -> None:
        """Hand one step's outputs over; wakes the loop once. Called on the engine's thread."""
        # A closed loop has nobody left who reads.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._dispatch, outputs)

    def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._by_request.pop(request_id, None)

    def __len__(self) -> int:
        """How many requests are still listened to."""
        return len(self._by_request)

    def _dispatch(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._by_request.get(output.request_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._by_request[output.request_id]
            stream.push(output)
