"""Runs one order in the engine: takes its outputs, counts its usage, and ends it for certain."""

import asyncio
import time
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Self

from infuse.server.api.answer_schemas import CompletionTokensDetails, Usage
from infuse.server.api.endings import join, raise_if_failed
from infuse.server.api.orders import Order
from infuse.server.caller import Caller
from infuse.server.engine.request import FinishReason, GenerationRequest, Output
from infuse.server.errors import RETRY_SOON, ApiError
from infuse.server.observability import access
from infuse.server.observability.answered import Answered, Choice
from infuse.server.observability.metering import Amount
from infuse.server.observability.metrics import RequestMetrics
from infuse.server.services import Services
from infuse.server.streams import Stream

_ANSWERED = (FinishReason.STOP, FinishReason.LENGTH)
"""How a choice ends where neither its client nor the server cuts it short."""
_WRITE_SECONDS = 1.0
MAX_UNREAD = 1 << 16
"""A generation is cancelled when more outputs than this, some tens of megabytes, are unread."""


class _Running:
    """A submitted request that has not ended."""

    def __init__(self, request: GenerationRequest, caller: Caller, metrics: RequestMetrics) -> None:
        self.request = request
        self.caller = caller
        self.metrics = metrics
        self.tokens = 0
        self.lacked_slot: float | None = None
        self.started: float | None = None

    def take(self, output: Output) -> None:
        if output.lacked_slot is not None:
            self.lacked_slot = output.lacked_slot
        if output.started is not None:
            self.started = output.started
            self.metrics.started(output.started)
        tokens = len(output.token_ids)
        if tokens:
            self.tokens += tokens
            self.metrics.token(tokens)
            self.caller.spend_tokens(tokens)

    def end(self, number: int, reason: FinishReason) -> Choice:
        # Metrics count a dead engine as an error like any other.
        dead = reason is FinishReason.ENGINE_DEAD
        outcome = FinishReason.ERROR if dead else reason
        self.caller.end_request()
        self.metrics.finished(outcome.value, len(self.request.prompt), self.tokens)
        return Choice(
            number=number,
            lacked_slot=self.lacked_slot,
            started=self.started,
            first_token=self.metrics.first_token,
            ended=time.perf_counter(),
            finish=reason,
        )


class Generation:
    """An order that was submitted to the engine, which owns the order's leases from here on.

    An error in its `with` block cancels the requests that still run. A stream outlives the block,
    and closes the generation itself. Starting raises what `Engine.submit` raises, and ApiError 400
    or 429 for the limits of the caller's scope; nothing runs then.
    """

    def __init__(self, services: Services, order: Order) -> None:
        self.order = order
        self._engine = services.engine
        self._streams = services.streams
        self._prompt_tokens = order.prompt_tokens
        self._numbers = {request.id: number for number, request in enumerate(order.requests)}
        self._completion_tokens = self._predicted_tokens = self._cached_tokens = 0
        self._submitted = time.perf_counter()
        self._ended: list[Choice] = []
        self._has_failed = False
        self._meter = services.meter
        self._written: Future[None] | None = None
        """Done once its usage is on the disk."""
        self._failure: ApiError | None = None
        """Why the server has ended it before the engine did."""
        self._stream = Stream(self._numbers)
        self._streams.open(self._numbers, self)
        metrics = services.metrics.generation
        self._label = metrics.label_of(services.model_name, order.adapter)
        caller, count = order.caller, len(order.requests)
        # The engine may run a request before `submit` returns.
        self._running = {
            request.id: _Running(request, caller, metrics.request_started(self._label))
            for request in order.requests
        }
        try:
            if order.deadline.seconds_left <= 0:
                raise order.deadline.exceeded()
            caller.check_order(count, self._prompt_tokens, services.settings.max_queue)
            self._engine.submit(*order.requests)
        except BaseException:
            self._streams.close(self._numbers)
            for request in order.requests:
                if request.lease is not None:
                    request.lease.release()
            raise
        caller.begin_order(count, self._prompt_tokens)
        access.describe(self.answered)
        self._queue_seconds = services.settings.max_queue_seconds
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._seconds_left, self._check_time)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.close()

    def take(self, output: Output) -> None:
        """Count an output the moment it arrives, and keep it until it is read."""
        if self._stream.unread > MAX_UNREAD:
            problem = f"{MAX_UNREAD} outputs were left unread; the rest was cancelled. Read faster."
            self._fail(ApiError(408, problem, code="unread_answer"), FinishReason.CANCELLED)
            return
        self._running[output.request_id].take(output)
        self._completion_tokens += len(output.token_ids)
        self._predicted_tokens += output.predicted_tokens
        if output.finish_reason is not None:
            if self._numbers[output.request_id] % self.order.choices == 0:
                self._cached_tokens += output.cached_tokens
            self._has_failed |= output.finish_reason not in _ANSWERED
            self._end(output.request_id, output.finish_reason)
        self._stream.take(output)

    def _end(self, request_id: str, reason: FinishReason) -> None:
        running = self._running.pop(request_id)
        self._ended.append(running.end(self._numbers[request_id], reason))
        if self._running:
            return
        self._timer.cancel()
        if not self._has_failed:
            amount = Amount(
                requests=1,
                prompt_tokens=self._prompt_tokens,
                cached_tokens=self._cached_tokens,
                completion_tokens=self._completion_tokens,
                microseconds=round(self.answered().running_seconds * 1e6),
            )
            self._written = self._meter.add(self.order.caller.name or "", self._label, amount)

    async def metered(self) -> None:
        """Wait until the usage is written: an answer that has arrived whole is counted, whatever
        happens to the server. A disk that hangs does not hold it up for long."""
        if self._written is not None:
            await asyncio.wait([asyncio.wrap_future(self._written)], timeout=_WRITE_SECONDS)

    def _check_time(self) -> None:
        """End it where its time is over, or nothing of it has started within the queue's time."""
        left = self._seconds_left
        if left > 0:
            self._timer = self._loop.call_later(left, self._check_time)
        elif self.order.deadline.seconds_left <= 0:
            self._fail(self.order.deadline.exceeded(), FinishReason.TIMEOUT)
        else:
            message = (
                f"The request has waited {self._queue_seconds:g} s in the queue, as long as this "
                "server lets one wait (--max-queue-seconds): send it again later."
            )
            error = ApiError(503, message, code="queue_timeout", headers=RETRY_SOON)
            self._fail(error, FinishReason.TIMEOUT)

    @property
    def _seconds_left(self) -> float:
        """How long it may go on as it is: waiting, or running."""
        left = self.order.deadline.seconds_left
        in_queue = self._submitted + self._queue_seconds - time.perf_counter()
        return left if left <= in_queue or self._has_started else in_queue

    @property
    def _has_started(self) -> bool:
        """Whether a choice has left the queue."""
        has_ended = len(self._running) < len(self.order.requests)
        return has_ended or any(map(self._engine.has_started, self._running))

    def _fail(self, error: ApiError, reason: FinishReason) -> None:
        self._failure = error
        self._has_failed |= error.status >= 500
        self.close(reason)

    @property
    def usage(self) -> Usage:
        usage = Usage.of(self._prompt_tokens, self._completion_tokens, self._cached_tokens)
        given = sum(len(request.prediction) for request in self.order.requests)
        if given:
            usage.completion_tokens_details = CompletionTokensDetails(
                accepted_prediction_tokens=self._predicted_tokens,
                rejected_prediction_tokens=given - self._predicted_tokens,
            )
        return usage

    @property
    def usage_so_far(self) -> Mapping[str, int]:
        """The tokens alone: how many were cached or predicted is known at the end."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def answered(self) -> Answered:
        """What is known of it, once it has ended."""
        order = self.order
        return Answered(
            id=order.id,
            model=order.model,
            adapter=order.adapter,
            fingerprint=order.fingerprint,
            submitted=self._submitted,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            completion_tokens=self._completion_tokens,
            choices=tuple(self._ended),
        )

    @property
    def ended(self) -> bool:
        """Whether no more outputs come; those that have come may still be unread."""
        return self._stream.finished

    async def next(self) -> list[tuple[int, Output]]:
        """The unread outputs, each with its choice's number: at least one, and none after the last.
        Raises ApiError where too many were left unread, or the time is over."""
        outputs = await self._stream.next()
        if self._failure is not None:
            raise self._failure
        return [(self._numbers[each.request_id], each) for each in outputs]

    async def whole(self) -> list[Output]:
        """Each choice's outputs joined to one, in order. Raises ApiError where a choice failed."""
        await self._stream.wait_for_all()
        parts: list[list[Output]] = [[] for _ in self.order.requests]
        for number, output in await self.next():
            raise_if_failed(output)
            parts[number].append(output)
        await self.metered()
        return [join(outputs) for outputs in parts]

    def close(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """Cancel the requests that still run; a second time does nothing."""
        self._stream.end()
        self._streams.close(self._running)
        for request_id in list(self._running):
            self._engine.cancel(request_id)
            self._end(request_id, reason)
