"""Writes the outputs of a conversation in the shape of OpenAI's chat completions."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from infuse.server.api.answer_schemas import Usage
from infuse.server.api.answering import Chunk, Writer
from infuse.server.api.chat_schemas import (
    AssistantMessage,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatFinishedBecause,
    ChatLogprobs,
    ChunkChoice,
    Delta,
)
from infuse.server.api.endings import finished_because, stopped_by
from infuse.server.api.logprobs import TokenBytes, chat_logprobs
from infuse.server.api.orders import Order
from infuse.server.api.tool_formats import CallFormat
from infuse.server.api.tool_reading import CallPart, Reader, Said, make_reader
from infuse.server.api.tool_schemas import CalledFunction, Tool, ToolCall
from infuse.server.engine.request import Output


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the model reads it, and how the model writes tool calls."""

    text: str
    """What the chat template wrote."""
    calls: CallFormat | None
    """None where the request offers no tools."""

    def make_reader(self, tools: Sequence[Tool]) -> Reader | None:
        """What reads one choice's calls of these tools; None where there are none."""
        return None if self.calls is None else make_reader(self.calls, self.text, tools)


def read(reader: Reader | None, output: Output) -> Said:
    """Split a choice's next output into its text and its tool calls."""
    if reader is None:
        return Said(output.text, [])
    said = reader.feed(output.text)
    if output.finish_reason is None:
        return said
    rest = reader.finish()
    return Said(said.content + rest.content, said.calls + rest.calls)


class ChatWriter(Writer):
    """Writes outputs as OpenAI's chat completions, and as their chunks."""

    def __init__(self, body: ChatBody, order: Order, conversation: Conversation) -> None:
        self._body = body
        self._conversation = conversation
        self._readers: dict[int, Reader | None] = {}
        self._called: set[int] = set()
        """The numbers of the choices that have called a tool."""
        self._token_bytes = TokenBytes(order.vocabulary.tokenizer) if body.logprobs else None
        self._opened: set[int] = set()
        self._head = order.head
        self._chunk_head = {**self._head, **body.chunk_usage, "object": "chat.completion.chunk"}

    def whole(self, outputs: Sequence[Output], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            **self._head,
            object="chat.completion",
            choices=[self._choice(number, output) for number, output in enumerate(outputs)],
            usage=usage,
        )

    def chunks(self, number: int, output: Output) -> Iterator[Chunk]:
        if number not in self._opened:
            self._opened.add(number)
            yield self._chunk([_addition(number, {"role": "assistant", "content": ""})])
        said = self._read(number, output)
        if said.content or (output.logprobs and self._token_bytes is not None):
            addition = _addition(number, {"content": said.content})
            scores = self._score(output)
            if scores is not None:
                addition["logprobs"] = scores.model_dump(exclude_unset=True)
            yield self._chunk([addition])
        if said.calls:
            calls = [_call_delta(part) for part in said.calls]
            yield self._chunk([_addition(number, {"tool_calls": calls})])
        if output.finish_reason is not None:
            last = _addition(number, {})
            last["finish_reason"] = self._because(number, output)
            last["stop_reason"] = stopped_by(self._body, output)
            yield self._chunk([last])

    def closing(self, usage: Usage) -> Iterator[Chunk]:
        if self._body.wants_usage_chunk:
            yield {**self._chunk([]), "usage": usage.model_dump(exclude_unset=True)}

    def _chunk(self, choices: list[ChunkChoice]) -> Chunk:
        return {**self._chunk_head, "choices": choices}

    def _choice(self, number: int, output: Output) -> ChatChoice:
        said = self._read(number, output)
        because = self._because(number, output)
        assert because is not None, "a whole answer has ended"
        message = AssistantMessage(role="assistant", content=said.content)
        if said.calls:
            message.content = said.content or None
            message.tool_calls = joined(said.calls)
        return ChatChoice(
            index=number,
            message=message,
            logprobs=self._score(output),
            finish_reason=because,
            stop_reason=stopped_by(self._body, output),
        )

    def _read(self, number: int, output: Output) -> Said:
        if number not in self._readers:
            self._readers[number] = self._conversation.make_reader(self._body.offered_tools)
        said = read(self._readers[number], output)
        if said.calls:
            self._called.add(number)
        return said

    def _because(self, number: int, output: Output) -> ChatFinishedBecause | None:
        """Why a choice ended, as OpenAI says it: "tool_calls" only where the model decided to call,
        not where the request names the function."""
        because = finished_because(output)
        decided = number in self._called and not self._body.names_a_tool
        return "tool_calls" if because == "stop" and decided else because

    def _score(self, output: Output) -> ChatLogprobs | None:
        if self._token_bytes is None:
            return None
        return chat_logprobs(self._token_bytes, output.logprobs)


def _call_delta(part: CallPart) -> dict[str, Any]:
    function = {"arguments": part.arguments}
    if part.name is None:
        return {"index": part.index, "function": function}
    return {
        "index": part.index,
        "id": part.id,
        "type": "function",
        "function": {"name": part.name, **function},
    }


def joined(parts: Sequence[CallPart]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for part in parts:
        if part.name is not None and part.id is not None:
            function = CalledFunction(name=part.name, arguments=part.arguments)
            calls.append(ToolCall(id=part.id, type="function", function=function))
        else:
            calls[-1].function.arguments += part.arguments
    return calls


def _addition(number: int, delta: Delta) -> ChunkChoice:
    return {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
