"""Writes the outputs of a conversation in the shape of OpenAI's Responses API."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from infuse.server.api.answer_schemas import Usage
from infuse.server.api.answering import Chunk, Writer
from infuse.server.api.chat_schemas import ChatBody
from infuse.server.api.chat_writer import Conversation, read
from infuse.server.api.endings import finished_because
from infuse.server.api.logprobs import TokenBytes, chat_logprobs
from infuse.server.api.orders import Order
from infuse.server.api.response_output_schemas import Response
from infuse.server.api.tool_reading import CallPart
from infuse.server.engine.request import Output
from infuse.server.errors import ApiError

EVENTS_EXAMPLE = (
    'event: response.created\ndata: {"type": "response.created", "sequence_number": 0, '
    '"response": {…}}\n\n'
)


@dataclass(slots=True)
class _Item:
    """A message or a call that is being written."""

    id: str
    index: int
    """Its number in the answer's output."""
    call: Mapping[str, object] | None = None
    """The call's name and `call_id`; None for a message."""
    text: str = ""
    """The message's text, or the call's arguments."""
    scores: list[Any] = field(default_factory=list)
    """The log-probabilities of the message's tokens."""

    @property
    def place(self) -> dict[str, object]:
        """How an event names it, or a message's only part."""
        part = {"content_index": 0} if self.call is None else {}
        return {"item_id": self.id, "output_index": self.index, **part}

    @property
    def part(self) -> dict[str, object]:
        said = {"text": self.text, "annotations": [], "logprobs": self.scores}
        return {"type": "output_text", **said}

    def as_json(self, status: str) -> dict[str, object]:
        if self.call is not None:
            kind = {"type": "function_call", **self.call, "arguments": self.text}
        else:
            content = [] if status == "in_progress" else [self.part]
            kind = {"type": "message", "role": "assistant", "content": content}
        return {"id": self.id, "status": status, **kind}


class ResponseWriter(Writer):
    """Writes an answer, which is one choice, as OpenAI's response, and as its events.

    One item is open at a time: text after a call is a message of its own.
    """

    is_typed = True

    def __init__(
        self, chat: ChatBody, echo: Mapping[str, Any], order: Order, conversation: Conversation
    ) -> None:
        """`echo`: the fields of the request that stand in the answer again."""
        params = order.requests[0].params
        self._reader = conversation.make_reader(chat.offered_tools)
        self._token_bytes = TokenBytes(order.vocabulary.tokenizer) if chat.logprobs else None
        self._key = order.id.removeprefix("resp_")
        self._head = {
            "id": order.id,
            "object": "response",
            "created_at": order.created,
            "model": order.model,
            "system_fingerprint": order.fingerprint,
            **echo,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "truncation": "disabled",
            "background": False,
            "previous_response_id": None,
            "store": False,
        }
        self._numbers = count()
        self._scores: list[Any] = []
        """The log-probabilities of tokens whose text has not come yet."""
        self._open: _Item | None = None
        self._done: list[dict[str, object]] = []
        self._status = "in_progress"

    def whole(self, outputs: Sequence[Output], usage: Usage) -> Response:
        for output in outputs:
            for _ in self.chunks(0, output):
                pass
        return Response.model_validate(self._response(usage=usage))

    def opening(self) -> Iterator[Chunk]:
        yield self._event("response.created", response=self._response())
        yield self._event("response.in_progress", response=self._response())

    def chunks(self, _: int, output: Output) -> Iterator[Chunk]:
        said = read(self._reader, output)
        if self._token_bytes is not None and output.logprobs:
            scores = chat_logprobs(self._token_bytes, output.logprobs)
            self._scores += scores.model_dump(exclude_unset=True)["content"]
        if said.content:
            yield from self._say(said.content)
        for part in said.calls:
            yield from self._call(part)
        because = finished_because(output)
        if because is not None:
            self._status = "incomplete" if because == "length" else "completed"
            is_message = self._open is not None and self._open.call is None
            if self._open is None or (self._scores and is_message):
                yield from self._say("")
            yield from self._close(self._status)

    def closing(self, usage: Usage) -> Iterator[Chunk]:
        yield self._event(f"response.{self._status}", response=self._response(usage=usage))

    def failure(self, error: ApiError) -> Chunk:
        self._status = "failed"
        problem = {"code": error.code or "server_error", "message": error.message}
        return self._event("response.failed", response=self._response(problem=problem))

    def _say(self, text: str) -> Iterator[Chunk]:
        if self._open is None or self._open.call is not None:
            item = _Item(f"msg_{self._key}{self._next}", self._next)
            yield from self._begin(item)
            yield self._event("response.content_part.added", **item.place, part=item.part)
        else:
            item = self._open
        item.text += text
        item.scores += self._scores
        delta = {"delta": text, "logprobs": self._scores}
        yield self._event("response.output_text.delta", **item.place, **delta)
        self._scores = []

    def _call(self, part: CallPart) -> Iterator[Chunk]:
        if part.name is not None:
            call = {"call_id": part.id, "name": part.name}
            yield from self._begin(_Item(f"fc_{self._key}{self._next}", self._next, call))
        item = self._open
        assert item is not None, "a call begins with its name"
        if part.arguments:
            item.text += part.arguments
            name = "response.function_call_arguments.delta"
            yield self._event(name, **item.place, delta=part.arguments)

    @property
    def _next(self) -> int:
        """The number of the next item."""
        return len(self._done) + (self._open is not None)

    def _begin(self, item: _Item) -> Iterator[Chunk]:
        yield from self._close("completed")
        self._open = item
        added = {"output_index": item.index, "item": item.as_json("in_progress")}
        yield self._event("response.output_item.added", **added)

    def _close(self, status: str) -> Iterator[Chunk]:
        item, self._open = self._open, None
        if item is None:
            return
        if item.call is None:
            said = {"text": item.text, "logprobs": item.scores}
            yield self._event("response.output_text.done", **item.place, **said)
            yield self._event("response.content_part.done", **item.place, part=item.part)
        else:
            name = "response.function_call_arguments.done"
            yield self._event(name, **item.place, arguments=item.text)
        self._done.append(item.as_json(status))
        yield self._event("response.output_item.done", output_index=item.index, item=self._done[-1])

    def _event(self, kind: str, **fields: object) -> Chunk:
        return {"type": kind, "sequence_number": next(self._numbers), **fields}

    def _response(
        self, usage: Usage | None = None, problem: Mapping[str, str] | None = None
    ) -> dict[str, object]:
        is_cut = self._status == "incomplete"
        return {
            **self._head,
            "status": self._status,
            "error": problem,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._done,
            "usage": None if usage is None else _usage(usage),
        }


def _usage(usage: Usage) -> dict[str, object]:
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
