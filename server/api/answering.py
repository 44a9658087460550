"""Sends what is generated, as one JSON answer or as a stream of server-sent events."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import pydantic_core
from fastapi import Request
from fastapi.sse import format_sse_event
from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from infuse.server.api.answer_schemas import Usage
from infuse.server.api.disconnects import unless_client_leaves
from infuse.server.api.endings import raise_if_failed
from infuse.server.api.generation import Generation
from infuse.server.api.schemas import GenerationBody
from infuse.server.engine.request import Output
from infuse.server.errors import ApiError, error_json
from infuse.server.openapi import READS, errors, header

log = logging.getLogger(__name__)

EVENTS = "text/event-stream"
LINES = "application/x-ndjson"
Chunk = Mapping[str, object]
"""An event of a stream, as it becomes JSON. A pydantic model would take four times as long for
every token."""


class Writer(ABC):
    """Writes an order's outputs in the shape of one endpoint."""

    media_type: ClassVar[str] = EVENTS
    """A stream's. Each chunk is an event, or one of LINES of JSON; the last line ends a stream."""
    is_typed: ClassVar[bool] = False
    """Whether a stream's events are named by their `type`, and the last of them ends it. Otherwise
    they have no names, and `[DONE]` ends it."""

    @abstractmethod
    def whole(self, outputs: Sequence[Output], usage: Usage) -> BaseModel: ...

    def opening(self) -> Iterable[Chunk]:
        """What a stream begins with, before there are outputs."""
        return ()

    @abstractmethod
    def chunks(self, number: int, output: Output) -> Iterable[Chunk]:
        """What the next output of choice `number` adds to a stream."""

    @abstractmethod
    def closing(self, usage: Usage) -> Iterable[Chunk]:
        """What ends a stream that has not failed."""

    def failure(self, error: ApiError) -> Chunk:
        """What ends a stream that has failed."""
        return error_json(error)


def documented_answers(
    whole: type[BaseModel],
    events: str = 'data: {"id": "…"}\n\ndata: [DONE]\n\n',
    media_type: str = EVENTS,
) -> dict[int | str, dict[str, Any]]:
    """A generation endpoint's answers in the OpenAPI document. `events`: how its streams look."""
    which = header("Which revision answered; the base has none.", always=False)
    answer = {
        "model": whole,
        "description": "The answer; with `stream`, its chunks.",
        "content": {media_type: {"example": events}},
        "headers": {"Infuse-Adapter": which},
    }
    disabled = "The key may not do this, or the adapter is disabled."
    return {200: answer} | errors(404, 429, 504, *READS, said={403: disabled})


async def respond(
    request: Request, body: GenerationBody, generation: Generation, writer: Writer
) -> Response:
    """Answer with what is generated, as a stream or as a whole."""
    if body.stream:
        return GenerationStream(generation, writer, body)
    outputs = await unless_client_leaves(request, generation.whole())
    return whole_answer(generation, writer.whole(outputs, generation.usage))


def whole_answer(generation: Generation, answer: BaseModel) -> Response:
    """The answer as JSON. Writers set every field of OpenAI's shape; unset fields are left out."""
    text = answer.model_dump_json(exclude_unset=True)
    return Response(text, media_type="application/json", headers=generation.order.headers)


class GenerationStream(StreamingResponse):
    """Streams the outputs; a client that leaves early cancels the rest."""

    def __init__(self, generation: Generation, writer: Writer, body: GenerationBody) -> None:
        self._generation = generation
        headers = {"X-Accel-Buffering": "no"}
        super().__init__(
            _events(generation, writer, body),
            headers=headers | generation.order.headers,
            media_type=writer.media_type,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.close()


async def _events(
    generation: Generation, writer: Writer, body: GenerationBody
) -> AsyncIterator[bytes]:
    """The stream's events: those of a step in one piece, and in the last piece those that end the
    stream."""
    counts = body.wants_usage_in_all_chunks
    events = [_event(writer, chunk) for chunk in writer.opening()]
    try:
        if events:
            yield b"".join(events)
            events.clear()
        while outputs := await generation.next():
            for number, output in outputs:
                raise_if_failed(output)
                chunks = writer.chunks(number, output)
                if counts:
                    chunks = [{**chunk, "usage": generation.usage_so_far} for chunk in chunks]
                events += [_event(writer, chunk) for chunk in chunks]
            if events and not generation.ended:
                yield b"".join(events)
                events.clear()
        await generation.metered()
        events += [_event(writer, chunk) for chunk in writer.closing(generation.usage)]
    except ApiError as error:
        events.append(_failure(writer, error))
    except Exception as error:
        log.error("The stream %s failed.", generation.order.id, exc_info=error)
        events.append(_failure(writer, ApiError(500, "The server failed; its log says why.")))
    if writer.media_type == EVENTS and not writer.is_typed:
        events.append(format_sse_event(data_str="[DONE]"))
    yield b"".join(events)


def _event(writer: Writer, chunk: Chunk) -> bytes:
    return _written(writer, chunk, pydantic_core.to_json(chunk).decode())


def _failure(writer: Writer, error: ApiError) -> bytes:
    chunk = writer.failure(error)
    # An error's message may have half of a surrogate pair, which pydantic does not write.
    return _written(writer, chunk, json.dumps(chunk))


def _written(writer: Writer, chunk: Chunk, text: str) -> bytes:
    if writer.media_type == LINES:
        return text.encode() + b"\n"
    return format_sse_event(data_str=text, event=str(chunk["type"]) if writer.is_typed else None)
