"""`POST /api/chat` and `POST /api/generate`: Ollama's API over the chat's."""

import json
from collections.abc import Sequence
from itertools import count
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from infuse.server.api.answering import LINES, documented_answers, respond
from infuse.server.api.chat import order_chat
from infuse.server.api.deadlines import Deadline, DeadlineDep
from infuse.server.api.foreign_fields import refuse_foreign
from infuse.server.api.generation import Generation
from infuse.server.api.leasing import leased
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.ollama_schemas import (
    REFUSED_IN_BODY,
    OllamaBody,
    OllamaCall,
    OllamaChatAnswer,
    OllamaChatBody,
    OllamaGenerateAnswer,
    OllamaGenerateBody,
    OllamaMessage,
)
from infuse.server.api.ollama_writer import (
    LINES_EXAMPLE,
    OllamaGenerateWriter,
    OllamaWriter,
    now,
)
from infuse.server.api.preparing import prepared
from infuse.server.api.translating import chat_body
from infuse.server.auth import CallerDep
from infuse.server.caller import Caller
from infuse.server.services import Services, ServicesDep

router = APIRouter(tags=["generation"])

_AS_THEY_ARE = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
)
"""Options whose names chat completions share."""


@router.post(
    "/api/chat",
    summary="Answer a conversation, as Ollama's API does",
    response_model=None,
    responses=documented_answers(OllamaChatAnswer, LINES_EXAMPLE, LINES),
)
async def chat(
    body: OllamaChatBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> Response:
    """Answer a conversation with the base model or an adapter, as Ollama's API does."""
    tools = None if body.tools is None else [tool.model_dump() for tool in body.tools]
    messages = _conversation(body.messages or [])
    return await _answer(OllamaWriter, body, messages, tools, request, services, caller, deadline)


@router.post(
    "/api/generate",
    summary="Answer a text, as Ollama's API does",
    response_model=None,
    responses=documented_answers(OllamaGenerateAnswer, LINES_EXAMPLE, LINES),
)
async def generate(
    body: OllamaGenerateBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> Response:
    """Answer a text, which the model's chat template makes a conversation of, as Ollama's API
    does."""
    messages = []
    if body.prompt:
        messages = [{"role": "user", "content": body.prompt}]
        if body.system:
            messages.insert(0, {"role": "system", "content": body.system})
    return await _answer(
        OllamaGenerateWriter, body, messages, None, request, services, caller, deadline
    )


async def _answer(
    writes: type[OllamaWriter],
    body: OllamaBody,
    messages: Sequence[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    request: Request,
    services: Services,
    caller: Caller,
    deadline: Deadline,
) -> Response:
    refuse_foreign(body.model_extra or {}, REFUSED_IN_BODY)
    chat = chat_body(
        {name: getattr(body, name) for name in ModelBody.model_fields}
        | _sampling(body)
        | {
            "messages": messages or [{"role": "user", "content": ""}],
            "tools": tools,
            "stream": body.stream is not False,
            "response_format": _format(body),
            "chat_template_kwargs": None if body.think is None else {"enable_thinking": False},
            "logprobs": body.logprobs,
            "top_logprobs": body.top_logprobs,
        }
    )
    if not messages:
        return await _loaded(writes, chat, request, services, caller, deadline)
    order, conversation = await order_chat(
        chat, request, services, caller, deadline, prefix="ollama-"
    )
    with Generation(services, order) as generation:
        reader = conversation.make_reader(chat.offered_tools)
        writer = writes(chat, order, reader, generation.answered)
        return await respond(request, chat, generation, writer)


async def _loaded(
    writes: type[OllamaWriter],
    body: ModelBody,
    request: Request,
    services: Services,
    caller: Caller,
    deadline: Deadline,
) -> Response:
    """The answer to a request without a text, by which clients of Ollama load a model."""

    def check() -> None:
        with leased(services, body, caller):
            pass

    await prepared(request, services, caller, deadline, check)
    end = {"done": True, "done_reason": "load"}
    return JSONResponse({"model": body.model, "created_at": now(), **writes.saying("", []), **end})


def _sampling(body: OllamaBody) -> dict[str, Any]:
    options = body.options
    if options is None:
        return {}
    limit = options.num_predict
    return {name: getattr(options, name) for name in _AS_THEY_ARE} | {
        "max_tokens": None if limit is None or limit < 0 else limit,
        "repetition_penalty": options.repeat_penalty,
    }


def _format(body: OllamaBody) -> dict[str, Any] | None:
    if not isinstance(body.format, dict):
        return {"type": "json_object"} if body.format else None
    schema = {"name": "format", "schema": body.format}
    return {"type": "json_schema", "json_schema": schema}


def _conversation(messages: Sequence[OllamaMessage]) -> list[dict[str, Any]]:
    """The messages as those of a chat, whose calls have ids."""
    # Counted, not random: conversations that begin alike stay alike. Nine characters, as Mistral's
    # templates demand.
    ids = (f"{number:09}" for number in count())
    unanswered: list[dict[str, Any]] = []
    said = []
    for message in messages:
        calls = [_call(call, call.id or next(ids)) for call in message.tool_calls or ()]
        unanswered += calls
        fields = {
            "role": message.role,
            "content": message.content or "",
            "tool_calls": calls or None,
            "reasoning_content": message.thinking,
        }
        if message.role == "tool":
            fields["name"] = message.tool_name
            fields["tool_call_id"] = message.tool_call_id or _answered(unanswered, message)
        said.append(fields)
    return said


def _call(call: OllamaCall, id_: str) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": json.dumps(call.function.arguments)}
    return {"id": id_, "type": "function", "function": function}


def _answered(unanswered: list[dict[str, Any]], message: OllamaMessage) -> str:
    """The id of the call that a tool's message answers: the first one of its function."""
    of_it = [call for call in unanswered if call["function"]["name"] == message.tool_name]
    for call in (of_it or unanswered)[:1]:
        unanswered.remove(call)
        return str(call["id"])
    return f"{0:09}"
