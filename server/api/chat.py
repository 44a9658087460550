"""`POST /v1/chat/completions`."""

from collections.abc import Iterator, Sequence
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from server.api.chat_schemas import (
    AssistantMessage,
    ChatBody,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatLogprobs,
    ChunkChoice,
    Delta,
)
from server.api.generation import (
    Order,
    check_fan_out,
    describe,
    finished_because,
    place_order,
    respond,
)
from server.api.leasing import leased
from server.api.logprobs import TokenBytes, chat_logprobs
from server.api.prompts import encode_conversation, fit_to_window
from server.api.sampling import sampling_params
from server.api.schemas import Usage
from server.engine.request import Output
from server.errors import ApiError
from server.services import Services, get_services

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=None,
    responses=describe(ChatCompletion),
)
async def create_chat_completion(
    body: ChatBody, request: Request, services: Annotated[Services, Depends(get_services)]
) -> Response:
    """Answer a conversation with the base model or an adapter, as OpenAI's API does."""
    check_fan_out(services, body, 1)
    order = await to_thread.run_sync(_prepare, services, body)
    return await respond(request, services, body, order, ChatWriter(body, order))


def _prepare(services: Services, body: ChatBody) -> Order:
    with leased(services, body) as (lease, vocabulary):
        field, limit = body.token_limit
        if limit == 0:
            raise ApiError(400, f"{field} must be at least 1.", param=field)
        prompt = encode_conversation(services.engine, vocabulary, body)
        params = sampling_params(
            services.engine,
            vocabulary,
            body,
            max_tokens=fit_to_window(services.engine, prompt, field, limit, None),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        prompts = [(prompt, params)]
        return place_order(services, body, "chatcmpl", prompts, lease, vocabulary)


class ChatWriter:
    """Writes outputs as OpenAI's chat completions, and as their chunks."""

    def __init__(self, body: ChatBody, order: Order) -> None:
        self._order = order
        self._token_bytes = TokenBytes(order.vocabulary.tokenizer) if body.logprobs else None
        self._opened: set[int] = set()

    def whole(self, outputs: Sequence[Output], usage: Usage) -> ChatCompletion:
        return ChatCompletion(
            id=self._order.id,
            object="chat.completion",
            created=self._order.created,
            model=self._order.model,
            system_fingerprint=self._order.fingerprint,
            choices=[self._choice(number, output) for number, output in enumerate(outputs)],
            usage=usage,
        )

    def chunks(self, number: int, output: Output) -> Iterator[ChatChunk]:
        if number not in self._opened:
            self._opened.add(number)
            yield self._chunk([_addition(number, Delta(role="assistant", content=""))])
        if output.text or (output.logprobs and self._token_bytes is not None):
            delta = Delta(content=output.text)
            yield self._chunk([_addition(number, delta, logprobs=self._score(output))])
        if output.finish_reason is not None:
            last = _addition(number, Delta())
            last.finish_reason = finished_because(output)
            yield self._chunk([last])

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        chunk = self._chunk([])
        chunk.usage = usage
        return chunk

    def _chunk(self, choices: list[ChunkChoice]) -> ChatChunk:
        return ChatChunk(
            id=self._order.id,
            object="chat.completion.chunk",
            created=self._order.created,
            model=self._order.model,
            system_fingerprint=self._order.fingerprint,
            choices=choices,
        )

    def _choice(self, number: int, output: Output) -> ChatChoice:
        because = finished_because(output)
        assert because is not None, "a whole answer has ended"
        return ChatChoice(
            index=number,
            message=AssistantMessage(role="assistant", content=output.text),
            logprobs=self._score(output),
            finish_reason=because,
        )

    def _score(self, output: Output) -> ChatLogprobs | None:
        if self._token_bytes is None:
            return None
        return chat_logprobs(self._token_bytes, output.logprobs)


def _addition(number: int, delta: Delta, logprobs: ChatLogprobs | None = None) -> ChunkChoice:
    return ChunkChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=None)
