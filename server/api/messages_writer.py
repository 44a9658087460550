"""Writes the outputs of a conversation in the shape of Anthropic's messages."""

from collections.abc import Iterator, Sequence
from typing import Any

import pydantic_core

from infuse.server.api import answer_schemas
from infuse.server.api.answering import Chunk, Writer
from infuse.server.api.chat_writer import joined, read
from infuse.server.api.messages_answer_schemas import (
    AnthropicAnswer,
    CallBlock,
    EndReason,
    SaidBlock,
    Usage,
)
from infuse.server.api.orders import Order
from infuse.server.api.tool_reading import CallPart, Reader, Said
from infuse.server.api.tool_schemas import ToolCall
from infuse.server.engine.request import FinishReason, Output

EVENTS_EXAMPLE = 'event: message_stop\ndata: {"type": "message_stop"}\n\n'


class MessagesWriter(Writer):
    """Writes the one choice of an order as Anthropic's message, and as the events of its stream."""

    is_typed = True

    def __init__(self, order: Order, reader: Reader | None) -> None:
        self._order = order
        self._reader = reader
        self._has_called = False
        self._open: str | None = None
        """The type of the block that is being written."""
        self._index = -1
        """The number of the latest block."""
        self._end: dict[str, Any] = {}
        """Why the answer ended."""

    def whole(self, outputs: Sequence[Output], usage: answer_schemas.Usage) -> AnthropicAnswer:
        [output] = outputs
        said = self._read(output)
        text = [SaidBlock(type="text", text=said.content)] if said.content else []
        return AnthropicAnswer(
            **self._head,
            content=[*text, *map(_block, joined(said.calls))],
            **self._ended(output),
            usage=_usage(usage),
        )

    def opening(self) -> Iterator[Chunk]:
        yield {"type": "message_start", "message": self._beginning}
        yield {"type": "ping"}

    def chunks(self, _: int, output: Output) -> Iterator[Chunk]:
        yield from self._add(self._read(output))
        if output.finish_reason is not None:
            yield from self._close()
            self._end = self._ended(output)

    def closing(self, usage: answer_schemas.Usage) -> Iterator[Chunk]:
        counts = _usage(usage).model_dump()
        yield {"type": "message_delta", "delta": self._end, "usage": counts}
        yield {"type": "message_stop"}

    def _read(self, output: Output) -> Said:
        said = read(self._reader, output)
        self._has_called |= bool(said.calls)
        return said

    @property
    def _head(self) -> dict[str, Any]:
        order = self._order
        return {"id": order.id, "type": "message", "role": "assistant", "model": order.model}

    @property
    def _beginning(self) -> dict[str, Any]:
        """The message before anything is said. How much of the prompt was cached is known at the
        end."""
        usage = _usage(answer_schemas.Usage.of(self._order.prompt_tokens, 0, 0)).model_dump()
        end = {"stop_reason": None, "stop_sequence": None}
        return {**self._head, "content": [], **end, "usage": usage}

    def _add(self, said: Said) -> Iterator[Chunk]:
        if said.content:
            if self._open != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": said.content})
        for part in said.calls:
            if part.name is not None:
                yield from self._begin(_begun_call(part))
            yield self._delta({"type": "input_json_delta", "partial_json": part.arguments})

    def _begin(self, block: dict[str, Any]) -> Iterator[Chunk]:
        yield from self._close()
        self._open = block["type"]
        self._index += 1
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Chunk:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _close(self) -> Iterator[Chunk]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self._index}

    def _ended(self, output: Output) -> dict[str, Any]:
        stop = output.stop_reason if isinstance(output.stop_reason, str) else None
        reason: EndReason = "end_turn" if stop is None else "stop_sequence"
        if output.finish_reason is FinishReason.LENGTH:
            reason = "max_tokens"
        elif stop is None and self._has_called:
            reason = "tool_use"
        return {"stop_reason": reason, "stop_sequence": stop}


def _begun_call(part: CallPart) -> dict[str, Any]:
    return {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}


def _block(call: ToolCall) -> SaidBlock | CallBlock:
    """A call, with as much of its arguments as there is; a text where they are no JSON object."""
    written = call.function.arguments
    try:
        arguments = pydantic_core.from_json(written or "{}", allow_partial=True)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        return SaidBlock(type="text", text=f"{call.function.name}{written}")
    return CallBlock(type="tool_use", id=call.id, name=call.function.name, input=arguments)


def _usage(usage: answer_schemas.Usage) -> Usage:
    cached = usage.prompt_tokens_details.cached_tokens
    return Usage(
        input_tokens=usage.prompt_tokens - cached,
        cache_read_input_tokens=cached,
        cache_creation_input_tokens=0,
        output_tokens=usage.completion_tokens,
    )
