"""One HTTP request's way through the engine: leases, submission, outputs, and a certain end."""

import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import pydantic_core
from fastapi import Request
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from adapters.residency import Lease
from adapters.vocabulary.vocabulary import Vocabulary
from server.api.answer_schemas import CompletionTokensDetails, Usage
from server.api.endings import join
from server.api.foreign_fields import refuse_foreign
from server.api.model_schemas import ModelBody
from server.api.preparing import unless_client_leaves
from server.api.sampling import params_of_choice
from server.api.schemas import GenerationBody
from server.engine.errors import EngineDead
from server.engine.request import FinishReason, GenerationRequest, Output, SamplingParams
from server.errors import ApiError, error_body, from_engine_error
from server.metrics import RequestMetrics
from server.openapi import READS, errors, header
from server.services import Services

log = logging.getLogger(__name__)

MAX_UNREAD = 1 << 16
"""A stream whose reader leaves more outputs waiting, some tens of megabytes, is cancelled."""
_DEAD = str(EngineDead())
"""What the engine says of each request that its dead thread leaves behind."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A checked body, ready for the engine. Its requests own their leases until submitted.

    `requests` stand prompt by prompt: choice i of prompt p is number `p * choices + i`.
    """

    id: str
    created: int
    model: str
    adapter: str | None
    """`name@revision`, how several are mixed, or None for the base model."""
    fingerprint: str
    vocabulary: Vocabulary
    choices: int
    requests: tuple[GenerationRequest, ...]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; a prompt with several choices counts once."""
        return sum(len(request.prompt) for request in self.requests[:: self.choices])

    @property
    def head(self) -> dict[str, Any]:
        """What an answer and each chunk of it begin with."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.adapter is None else {"Infuse-Adapter": self.adapter}


def describe(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The answers of a generation endpoint, for the OpenAPI page."""
    events = {"text/event-stream": {"example": 'data: {"id": "…"}\n\ndata: [DONE]\n\n'}}
    which = header("Which revision answered; the base has none.", always=False)
    answer = {
        "model": whole,
        "description": "The answer; with `stream`, its chunks as events.",
        "content": events,
        "headers": {"Infuse-Adapter": which},
    }
    disabled = "The key lacks the role that this needs, or the adapter is disabled."
    return {200: answer} | errors(404, 429, *READS, said={403: disabled})


def check_order(services: Services, body: ModelBody, prompts: int) -> None:
    """Refuse what asks for something that is not served, and more choices than the queue holds:
    they could never be admitted together. Raises ApiError 400."""
    refuse_foreign(body.model_extra or {})
    wanted = prompts * body.choices_per_prompt
    if wanted > services.settings.max_queue:
        raise ApiError(
            400,
            f"{prompts} prompts with n = {body.choices_per_prompt} are {wanted} choices; this "
            f"server takes at most {services.settings.max_queue} in one request. Send several.",
            param="n" if prompts == 1 else "prompt",
        )


def place_order(
    services: Services,
    body: ModelBody,
    caller: str | None,
    prefix: str,
    prompts: Sequence[tuple[tuple[int, ...], SamplingParams]],
    lease: Lease | None,
    vocabulary: Vocabulary,
    *,
    speculation: bool | None = None,
    prediction: tuple[int, ...] = (),
) -> Order:
    """An order on what is leased, with a lease of its own for each choice.

    `caller`: the name of the key that it came with; a key's requests have one share of the model.
    """
    order_id = f"{prefix}-{uuid.uuid4().hex}"
    choices = body.choices_per_prompt
    salt = json.dumps([services.cache_scope(caller), body.cache_salt])
    with ExitStack() as undo:
        leases = [
            None if lease is None else undo.enter_context(lease.again())
            for _ in range(len(prompts) * choices)
        ]
        requests = tuple(
            GenerationRequest(
                id=f"{order_id}-{number}",
                prompt=prompts[number // choices][0],
                params=params_of_choice(prompts[number // choices][1], number % choices),
                lease=own,
                tenant=caller or "",
                priority=body.priority or 0,
                speculation=speculation,
                prediction=prediction,
                order=order_id,
                cache_salt=salt,
            )
            for number, own in enumerate(leases)
        )
        undo.pop_all()
    adapter = None if lease is None else lease.label
    return Order(
        id=order_id,
        created=int(time.time()),
        model=body.model,
        adapter=adapter,
        fingerprint=adapter or services.model_name,
        vocabulary=vocabulary,
        choices=choices,
        requests=requests,
    )


class _Running:
    """A submitted request that has not ended."""

    def __init__(self, request: GenerationRequest, metrics: RequestMetrics) -> None:
        self.request = request
        self.metrics = metrics
        self.tokens = 0

    def end(self, outcome: str) -> None:
        self.metrics.finished(outcome, len(self.request.prompt), self.tokens)


class Generation:
    """An order in the engine, which has the order's leases from here on.

    An error in its `with` block cancels what still runs. A stream outlives the block, and closes
    the generation itself. Starting raises what `Engine.submit` raises; nothing runs then.
    """

    def __init__(self, services: Services, order: Order) -> None:
        self.order = order
        self._engine = services.engine
        self._prompt_tokens = order.prompt_tokens
        self._numbers = {request.id: number for number, request in enumerate(order.requests)}
        self._completion_tokens = self._predicted_tokens = self._cached_tokens = 0
        self._is_unread = False
        """Whether it was cancelled because nobody reads it."""
        self._stream = services.streams.open(*self._numbers, observe=self._observe)
        label = services.metrics.label_of(services.model_name, order.adapter)
        try:
            self._engine.submit(*order.requests)
        except BaseException:
            _release(order.requests)
            self._stream.close()
            raise
        self._running = {
            request.id: _Running(request, services.metrics.request_started(label))
            for request in order.requests
        }

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

    def _observe(self, output: Output) -> None:
        if self._stream.unread > MAX_UNREAD:
            self._is_unread = True
            self.close()
            return
        running = self._running[output.request_id]
        if output.token_ids:
            running.tokens += len(output.token_ids)
            running.metrics.token(len(output.token_ids))
            self._completion_tokens += len(output.token_ids)
        self._predicted_tokens += output.predicted_tokens
        if output.finish_reason is not None:
            running.end(output.finish_reason.value)
            if self._numbers[output.request_id] % self.order.choices == 0:
                self._cached_tokens += output.cached_tokens
            del self._running[output.request_id]

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
        """Tokens alone: what was cached or predicted is known at the end."""
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    @property
    def ended(self) -> bool:
        """Whether nothing comes any more; what has come may still be read."""
        return self._stream.finished

    async def next(self) -> list[tuple[int, Output]]:
        """The choices' numbers and outputs that have come, one at least; none after the last.
        Raises ApiError where too many came that were not read."""
        if self._is_unread:
            problem = f"{MAX_UNREAD} outputs were left unread; the rest was cancelled. Read faster."
            raise ApiError(408, problem, code="unread_answer")
        return [(self._numbers[each.request_id], each) for each in await self._stream.next()]

    async def whole(self) -> list[Output]:
        """Each choice's outputs joined to one, in order. Raises ApiError where a choice failed."""
        await self._stream.wait_for_all()
        parts: list[list[Output]] = [[] for _ in self.order.requests]
        for number, output in await self.next():
            _raise_if_failed(output)
            parts[number].append(output)
        return [join(outputs) for outputs in parts]

    def close(self) -> None:
        """Cancel what still runs; a second time does nothing."""
        self._stream.close()
        for request_id, running in self._running.items():
            self._engine.cancel(request_id)
            running.end(FinishReason.CANCELLED.value)
        self._running.clear()


def _release(requests: Iterable[GenerationRequest]) -> None:
    for request in requests:
        if request.lease is not None:
            request.lease.release()


def _raise_if_failed(output: Output) -> None:
    if output.finish_reason is FinishReason.ERROR:
        if output.error == _DEAD:
            raise from_engine_error(EngineDead())
        raise ApiError(500, output.error or "The engine failed; the server's log says why.")
    if output.finish_reason is FinishReason.CONSTRAINT:
        raise ApiError(
            400,
            f"The constraint {output.error}; simplify it.",
            code="invalid_constraint",
        )
    if output.finish_reason is FinishReason.CANCELLED:
        raise ApiError(
            503,
            "The server is shutting down and could not finish this answer; send it again.",
            code="stopping",
            headers={"Retry-After": "5"},
        )


Chunk = Mapping[str, object]
"""An event of a stream, as it becomes JSON. Models take four times as long, at every token."""


class Writer(Protocol):
    """Writes an order's outputs in the shape of one endpoint."""

    def whole(self, outputs: Sequence[Output], usage: Usage) -> BaseModel: ...

    def chunks(self, number: int, output: Output) -> Iterable[Chunk]:
        """What the next output of choice `number` adds to a stream."""

    def usage_chunk(self, usage: Usage) -> Chunk: ...


async def respond(
    request: Request, body: GenerationBody, generation: Generation, writer: Writer
) -> Response:
    """Answer with what is generated, as a stream or as a whole."""
    if body.stream:
        return GenerationStream(generation, writer, body)
    outputs = await unless_client_leaves(request, generation.whole())
    answer = to_json(writer.whole(outputs, generation.usage))
    return Response(answer, media_type="application/json", headers=generation.order.headers)


def to_json(answer: BaseModel) -> str:
    """The answer's JSON: writers set all fields of OpenAI's shape, and unset ones stay out."""
    return answer.model_dump_json(exclude_unset=True)


class GenerationStream(EventSourceResponse):
    """The outputs as server-sent events, then `[DONE]`; whoever leaves early cancels the rest."""

    def __init__(self, generation: Generation, writer: Writer, body: GenerationBody) -> None:
        self._generation = generation
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(
            _events(generation, writer, body), headers=headers | generation.order.headers
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(
    generation: Generation, writer: Writer, body: GenerationBody
) -> AsyncIterator[bytes]:
    """The stream's events: a step's in one piece, and in the last piece what ends the stream."""
    counts = body.wants_usage_in_all_chunks
    events: list[bytes] = []
    try:
        while outputs := await generation.next():
            for number, output in outputs:
                _raise_if_failed(output)
                chunks = writer.chunks(number, output)
                if counts:
                    chunks = [{**chunk, "usage": generation.usage_so_far} for chunk in chunks]
                events += [_event(chunk) for chunk in chunks]
            if events and not generation.ended:
                yield b"".join(events)
                events.clear()
        if body.wants_usage_chunk:
            events.append(_event(writer.usage_chunk(generation.usage)))
    except ApiError as error:
        events.append(format_sse_event(data_str=error_body(error)))
    except Exception as error:
        log.error("The stream %s failed.", generation.order.id, exc_info=error)
        failure = ApiError(500, "The server failed; its log says why.")
        events.append(format_sse_event(data_str=error_body(failure)))
    yield b"".join([*events, format_sse_event(data_str="[DONE]")])


def _event(chunk: Chunk) -> bytes:
    return format_sse_event(data_str=pydantic_core.to_json(chunk).decode())
