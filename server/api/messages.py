"""`POST /v1/messages` and `POST /v1/messages/count_tokens`: Anthropic's API over the chat's."""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from infuse.server.api.answering import documented_answers, respond
from infuse.server.api.chat import order_chat
from infuse.server.api.chat_schemas import ChatBody
from infuse.server.api.deadlines import DeadlineDep
from infuse.server.api.foreign_fields import refuse_foreign
from infuse.server.api.generation import Generation
from infuse.server.api.leasing import leased
from infuse.server.api.messages_answer_schemas import AnthropicAnswer, TokenCount
from infuse.server.api.messages_schemas import (
    REFUSED_IN_BODY,
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    Block,
    CountTokensBody,
    MessagesBody,
    TextBlock,
    ToolResultBlock,
)
from infuse.server.api.messages_writer import EVENTS_EXAMPLE, MessagesWriter
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.preparing import prepared
from infuse.server.api.prompts import encode_conversation
from infuse.server.api.translating import chat_body
from infuse.server.auth import CallerDep
from infuse.server.openapi import READS, errors
from infuse.server.services import ServicesDep

router = APIRouter(tags=["generation"])
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
"""Anthropic's word -> OpenAI's."""


@router.post(
    "/v1/messages",
    summary="Answer a conversation, as Anthropic's API does",
    response_model=None,
    responses=documented_answers(AnthropicAnswer, EVENTS_EXAMPLE),
)
async def create_message(
    body: MessagesBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> Response:
    """Answer a conversation with the base model or an adapter, as Anthropic's Messages API does."""
    refuse_foreign(body.model_extra or {}, REFUSED_IN_BODY)
    chat = _as_chat(
        body,
        max_tokens=body.max_tokens,
        stream=body.stream,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
    )
    order, conversation = await order_chat(chat, request, services, caller, deadline, prefix="msg_")
    with Generation(services, order) as generation:
        writer = MessagesWriter(order, conversation.make_reader(chat.offered_tools))
        return await respond(request, chat, generation, writer)


@router.post(
    "/v1/messages/count_tokens",
    summary="Count the tokens of a conversation",
    responses=errors(404, 504, *READS),
)
async def count_tokens(
    body: CountTokensBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> TokenCount:
    """How many tokens `POST /v1/messages` would have the model read."""
    refuse_foreign(body.model_extra or {}, REFUSED_IN_BODY)
    chat = _as_chat(body)

    def count() -> int:
        with leased(services, chat, caller) as (_, vocabulary):
            _, token_ids = encode_conversation(services.engine.model, vocabulary, chat)
            return len(token_ids)

    return TokenCount(input_tokens=await prepared(request, services, caller, deadline, count))


def _as_chat(body: CountTokensBody, **more: Any) -> ChatBody:
    """The same request to chat completions. `more`: further fields of it. Raises
    RequestValidationError."""
    messages = [said for message in body.messages for said in _said(message)]
    if body.system:
        messages.insert(0, {"role": "system", "content": _texts(body.system)})
    fields = {name: getattr(body, name) for name in ModelBody.model_fields}
    if body.tools is not None:
        fields["tools"] = [_function(tool) for tool in body.tools]
    if body.tool_choice is not None:
        fields |= _choice(body.tool_choice)
    if body.output_config is not None and body.output_config.format is not None:
        schema = {"name": "output", "schema": body.output_config.format.schema_}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    if body.thinking is not None:
        fields["chat_template_kwargs"] = {"enable_thinking": False}
    if body.messages[-1].role == "assistant":
        fields["continue_final_message"] = True
    return chat_body({**fields, **more, "messages": messages})


def _said(message: AnthropicMessage) -> Iterator[dict[str, Any]]:
    """One message as those of a chat, in which each tool's result is a message of its own."""
    if message.role == "assistant":
        yield _answer(message)
        return
    for is_result, blocks in groupby(message.content, lambda each: each.type == "tool_result"):
        if is_result:
            yield from (_result(block) for block in blocks if isinstance(block, ToolResultBlock))
        else:
            yield {"role": message.role, "content": _texts(blocks)}


def _answer(message: AnthropicMessage) -> dict[str, Any]:
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": json.dumps(block.input)},
        }
        for block in message.content
        if block.type == "tool_use"
    ]
    thoughts = [block.thinking for block in message.content if block.type == "thinking"]
    return {
        "role": "assistant",
        "content": _texts(message.content),
        "tool_calls": calls or None,
        "reasoning_content": "\n".join(thoughts) or None,
    }


def _result(block: ToolResultBlock) -> dict[str, Any]:
    texts = _texts(block.content or [])
    if block.is_error:
        texts = [{"type": "text", "text": "Error: " + "\n".join(each["text"] for each in texts)}]
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": texts}


def _texts(blocks: Iterable[Block]) -> list[dict[str, str]]:
    return [{"type": "text", "text": each.text} for each in blocks if isinstance(each, TextBlock)]


def _function(tool: AnthropicTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": function}


def _choice(choice: AnthropicToolChoice) -> dict[str, Any]:
    named = {"type": "function", "function": {"name": choice.name}}
    return {
        "tool_choice": named if choice.type == "tool" else _CHOICES[choice.type],
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }
