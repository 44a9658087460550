"""`POST /v1/chat/completions`."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters.vocabulary.vocabulary import Vocabulary
from server.api.answer_schemas import Usage
from server.api.chat_schemas import (
    AssistantMessage,
    ChatBody,
    ChatChoice,
    ChatCompletion,
    ChatFinishedBecause,
    ChatLogprobs,
    ChunkChoice,
    Delta,
)
from server.api.constraining import chat_grammar
from server.api.endings import finished_because, stopped_by
from server.api.generation import (
    Chunk,
    Generation,
    Order,
    check_order,
    describe,
    place_order,
    respond,
)
from server.api.leasing import leased
from server.api.logprobs import TokenBytes, chat_logprobs
from server.api.preparing import prepared
from server.api.prompts import encode_conversation, encode_prediction, fit_to_window, truncated
from server.api.sampling import sampling_params
from server.api.tool_formats import CallFormat, find_format
from server.api.tool_reading import CallPart, Reader, Said, make_reader
from server.api.tool_schemas import CalledFunction, ToolCall
from server.auth import Caller
from server.engine import Engine
from server.engine.request import Output
from server.errors import ApiError
from server.services import Services, get_services

router = APIRouter(tags=["generation"])

MakeReader = Callable[[], Reader]


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=None,
    responses=describe(ChatCompletion),
)
async def create_chat_completion(
    body: ChatBody,
    request: Request,
    services: Annotated[Services, Depends(get_services)],
    caller: Caller,
) -> Response:
    """Answer a conversation with the base model or an adapter, as OpenAI's API does."""
    check_order(services, body, 1)
    prepare = partial(_prepare, services, body, caller)
    order, new_reader = await prepared(request, services, caller, prepare)
    with Generation(services, order) as generation:
        return await respond(request, body, generation, ChatWriter(body, order, new_reader))


def _prepare(
    services: Services, body: ChatBody, caller: str | None
) -> tuple[Order, MakeReader | None]:
    """The order, and what reads the tool calls out of a choice, where tools are offered."""
    engine = services.engine
    with leased(services, body) as (lease, vocabulary):
        field, limit = body.token_limit
        if limit == 0:
            raise ApiError(400, f"{field} must be at least 1.", param=field)
        text, prompt = encode_conversation(engine, vocabulary, body)
        prompt = truncated(engine, prompt, body, limit or 1)
        calls = _call_format(engine, vocabulary, body)
        params = sampling_params(
            engine,
            vocabulary,
            body,
            max_tokens=fit_to_window(engine, prompt, field, limit, None),
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            held=chat_grammar(engine, body, calls),
        )
        new_reader: MakeReader | None = None
        if calls is not None:
            # A call's marks may be special tokens.
            params = replace(params, skip_special_tokens=False)
            new_reader = partial(make_reader, calls, text, body.offered_tools)
        prompts = [(prompt, params)]
        order = place_order(
            services,
            body,
            caller,
            "chatcmpl",
            prompts,
            lease,
            vocabulary,
            speculation=body.speculation,
            prediction=encode_prediction(engine, vocabulary, body),
        )
        return order, new_reader


def _call_format(engine: Engine, vocabulary: Vocabulary, body: ChatBody) -> CallFormat | None:
    if not body.offered_tools:
        return None
    calls = find_format(vocabulary, engine.model.tokenizer.get_added_vocab())
    if calls is None:
        raise ApiError(
            400,
            "How this model writes tool calls is not known: its tokenizer has no "
            "response_template, and its chat template writes none as Hermes, Mistral or Llama 3 "
            "do. Leave the tools out.",
            param="tools",
        )
    return calls


class ChatWriter:
    """Writes outputs as OpenAI's chat completions, and as their chunks."""

    def __init__(self, body: ChatBody, order: Order, new_reader: MakeReader | None) -> None:
        self._body = body
        self._new_reader = new_reader
        self._readers: dict[int, Reader] = {}
        self._called: set[int] = set()
        """The choices that have called something."""
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

    def usage_chunk(self, usage: Usage) -> Chunk:
        return {**self._chunk([]), "usage": usage.model_dump(exclude_unset=True)}

    def _chunk(self, choices: list[ChunkChoice]) -> Chunk:
        return {**self._chunk_head, "choices": choices}

    def _choice(self, number: int, output: Output) -> ChatChoice:
        said = self._read(number, output)
        because = self._because(number, output)
        assert because is not None, "a whole answer has ended"
        message = AssistantMessage(role="assistant", content=said.content)
        if said.calls:
            message.content = said.content or None
            message.tool_calls = _joined(said.calls)
        return ChatChoice(
            index=number,
            message=message,
            logprobs=self._score(output),
            finish_reason=because,
            stop_reason=stopped_by(self._body, output),
        )

    def _read(self, number: int, output: Output) -> Said:
        """What the output says and calls."""
        if self._new_reader is None:
            return Said(output.text, [])
        if number not in self._readers:
            self._readers[number] = self._new_reader()
        reader = self._readers[number]
        said = reader.feed(output.text)
        if output.finish_reason is not None:
            rest = reader.finish()
            said = Said(said.content + rest.content, said.calls + rest.calls)
        if said.calls:
            self._called.add(number)
        return said

    def _because(self, number: int, output: Output) -> ChatFinishedBecause | None:
        """As OpenAI's: a function that the request names is no decision of the model's."""
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


def _joined(parts: Sequence[CallPart]) -> list[ToolCall]:
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
