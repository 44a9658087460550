"""Writes the outputs of a conversation in the shapes of Ollama's answers."""

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import pydantic_core
from pydantic import BaseModel

from infuse.server.api.answer_schemas import Usage
from infuse.server.api.answering import LINES, Chunk, Writer
from infuse.server.api.chat_schemas import ChatBody
from infuse.server.api.chat_writer import joined, read
from infuse.server.api.endings import finished_because
from infuse.server.api.logprobs import TokenBytes, chat_logprobs
from infuse.server.api.ollama_schemas import OllamaChatAnswer, OllamaGenerateAnswer
from infuse.server.api.orders import Order
from infuse.server.api.tool_reading import CallPart, Reader
from infuse.server.engine.request import Output
from infuse.server.observability.answered import Answered

LINES_EXAMPLE = '{"model": "…", "done": false, …}\n{"model": "…", "done": true, …}\n'
_NANOSECONDS = 1e9

Calls = list[dict[str, Any]]


class OllamaWriter(Writer):
    """Writes the one choice of an order, as answers of `/api/chat`."""

    media_type = LINES
    kind: type[BaseModel] = OllamaChatAnswer

    def __init__(
        self,
        body: ChatBody,
        order: Order,
        reader: Reader | None,
        answered: Callable[[], Answered],
    ) -> None:
        """`answered`: what is known once the order has ended."""
        self._model = order.model
        self._reader = reader
        self._token_bytes = TokenBytes(order.vocabulary.tokenizer) if body.logprobs else None
        self._answered = answered
        self._calls: list[CallPart] = []
        self._done_reason: str | None = None

    def whole(self, outputs: Sequence[Output], usage: Usage) -> BaseModel:
        [output] = outputs
        said = read(self._reader, output)
        self._calls += said.calls
        self._done_reason = finished_because(output)
        saying = self.saying(said.content, self._whole_calls())
        fields = {**self._head, **saying, **self._score(output), **self._end(usage)}
        return self.kind.model_validate(fields)

    def chunks(self, _: int, output: Output) -> Iterator[Chunk]:
        said = read(self._reader, output)
        self._calls += said.calls
        scores = self._score(output)
        if said.content or scores:
            yield {**self._head, **self.saying(said.content, []), **scores, "done": False}
        if output.finish_reason is not None:
            self._done_reason = finished_because(output)
            if calls := self._whole_calls():
                yield {**self._head, **self.saying("", calls), "done": False}

    def closing(self, usage: Usage) -> Iterator[Chunk]:
        yield {**self._head, **self.saying("", []), **self._end(usage)}

    @staticmethod
    def saying(text: str, calls: Calls) -> dict[str, Any]:
        """How a text and calls are written."""
        message = {"role": "assistant", "content": text}
        return {"message": message | ({"tool_calls": calls} if calls else {})}

    @property
    def _head(self) -> dict[str, Any]:
        return {"model": self._model, "created_at": now()}

    def _score(self, output: Output) -> dict[str, Any]:
        if self._token_bytes is None or not output.logprobs:
            return {}
        content = chat_logprobs(self._token_bytes, output.logprobs).content
        return {"logprobs": [each.model_dump() for each in content]}

    def _whole_calls(self) -> Calls:
        """The calls, but for one that the token limit cut: their arguments are objects, which
        cannot show it."""
        calls: Calls = []
        for call in joined(self._calls):
            try:
                arguments = pydantic_core.from_json(call.function.arguments)
            except ValueError:
                continue
            function = {"name": call.function.name, "arguments": arguments}
            calls.append({"id": call.id, "function": function})
        return calls

    def _end(self, usage: Usage) -> dict[str, Any]:
        answered = self._answered()
        total = answered.ended - answered.submitted
        queue = answered.queue_seconds or 0.0
        first = answered.first_token_seconds or total
        return {
            "done": True,
            "done_reason": self._done_reason,
            "total_duration": _nanoseconds(total),
            "load_duration": _nanoseconds(queue),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - queue),
            "eval_count": usage.completion_tokens,
            "eval_duration": _nanoseconds(total - first),
        }


class OllamaGenerateWriter(OllamaWriter):
    """Writes the one choice of an order, as answers of `/api/generate`."""

    kind = OllamaGenerateAnswer

    @staticmethod
    def saying(text: str, calls: Calls) -> dict[str, Any]:
        assert not calls, "tools are offered in conversations only"
        return {"response": text}


def now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    """At least one: clients divide by it."""
    return max(1, round(seconds * _NANOSECONDS))
