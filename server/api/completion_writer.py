"""Writes the outputs of prompts in the shape of OpenAI's completions."""

from collections.abc import Iterator, Sequence
from typing import Any

from infuse.server.api.answer_schemas import Usage
from infuse.server.api.answering import Chunk, Writer
from infuse.server.api.completion_schemas import Completion, CompletionBody, CompletionLogprobs
from infuse.server.api.endings import finished_because, stopped_by
from infuse.server.api.logprobs import CompletionLogprobWriter, TokenBytes
from infuse.server.api.orders import Order
from infuse.server.engine.request import Output


class CompletionWriter(Writer):
    """Writes outputs as OpenAI's completions: a chunk has the same shape as the whole."""

    def __init__(self, body: CompletionBody, order: Order) -> None:
        self._body = body
        self._order = order
        self._tokenizer = order.vocabulary.tokenizer
        self._token_bytes = TokenBytes(self._tokenizer) if body.logprobs is not None else None
        self._logprobs: dict[int, CompletionLogprobWriter] = {}
        self._echoed: set[int] = set()
        self._head = {**order.head, "object": "text_completion"}
        self._chunk_head = {**self._head, **body.chunk_usage}

    def whole(self, outputs: Sequence[Output], usage: Usage) -> Completion:
        choices = [self._choice(number, output) for number, output in enumerate(outputs)]
        return Completion.model_validate({**self._head, "choices": choices, "usage": usage})

    def chunks(self, number: int, output: Output) -> Iterator[Chunk]:
        choice = self._choice(number, output)
        scored = choice["logprobs"] is not None and choice["logprobs"]["tokens"]
        if choice["text"] or choice["finish_reason"] or scored:
            yield {**self._chunk_head, "choices": [choice]}

    def closing(self, usage: Usage) -> Iterator[Chunk]:
        if self._body.wants_usage_chunk:
            yield {**self._head, "choices": [], "usage": usage.model_dump(exclude_unset=True)}

    def _choice(self, number: int, output: Output) -> dict[str, Any]:
        echo = ""
        if self._body.echo and number not in self._echoed:
            self._echoed.add(number)
            echo = self._prompt_text(number)
        logprobs = self._score(number, output, echo)
        choice = {
            "index": number,
            "text": echo + output.text,
            "logprobs": None if logprobs is None else logprobs.model_dump(),
            "finish_reason": finished_because(output),
        }
        if output.finish_reason is not None:
            choice["stop_reason"] = stopped_by(self._body, output)
        return choice

    def _prompt_text(self, number: int) -> str:
        prompt = self._body.prompt[number // self._order.choices]
        if isinstance(prompt, str) and self._body.truncate_prompt_tokens is None:
            return prompt
        return str(self._tokenizer.decode(list(self._order.requests[number].prompt)))

    def _score(self, number: int, output: Output, echo: str) -> CompletionLogprobs | None:
        if self._token_bytes is None:
            return None
        request = self._order.requests[number]
        if number not in self._logprobs:
            self._logprobs[number] = CompletionLogprobWriter(
                self._token_bytes, request.params.skip_special_tokens
            )
        writer = self._logprobs[number]
        if output.prompt_logprobs is not None:
            writer.begin_prompt(echo)
            writer.write(zip(request.prompt, output.prompt_logprobs, strict=True))
            writer.begin_text(len(echo))
        writer.write((scored.token_id, scored) for scored in output.logprobs)
        return writer.take()
