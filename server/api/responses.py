"""`POST /v1/responses`: OpenAI's Responses API, served as a chat of which nothing is stored."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from infuse.adapters.errors import TemplateRefused
from infuse.server.api.answering import documented_answers, respond
from infuse.server.api.chat import order_chat
from infuse.server.api.chat_schemas import ChatBody, Message
from infuse.server.api.constraint_schemas import Constraint
from infuse.server.api.deadlines import DeadlineDep
from infuse.server.api.foreign_fields import REFUSED, REFUSED_OF_RESPONSES, refuse_foreign
from infuse.server.api.generation import Generation
from infuse.server.api.response_output_schemas import Response as ResponseObject
from infuse.server.api.response_schemas import (
    CallOutput,
    FunctionChoice,
    FunctionTool,
    InputMessage,
    PastCall,
    PastReasoning,
    ResponseBody,
)
from infuse.server.api.response_writer import EVENTS_EXAMPLE, ResponseWriter
from infuse.server.api.schemas import SamplingBody
from infuse.server.api.tool_schemas import (
    FunctionDefinition,
    FunctionName,
    NamedToolChoice,
    PastFunction,
    PastToolCall,
    Tool,
    ToolChoice,
)
from infuse.server.auth import CallerDep
from infuse.server.errors import ApiError, from_adapter_error
from infuse.server.openapi import errors
from infuse.server.services import ServicesDep

router = APIRouter(tags=["generation"])
_REFUSED = {**REFUSED, **REFUSED_OF_RESPONSES}


@router.post(
    "/v1/responses",
    summary="Answer a conversation, as OpenAI's Responses API does",
    response_model=None,
    responses=documented_answers(ResponseObject, EVENTS_EXAMPLE),
)
async def create_response(
    body: ResponseBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> Response:
    """Answer a conversation with the base model or an adapter. Nothing is stored."""
    refuse_foreign(body.model_extra or {}, _REFUSED)
    try:
        echo = body.echo
    except ValueError as error:
        raise ApiError(400, f"The answer cannot repeat the request's fields: {error}") from None
    chat = _as_chat(body)
    try:
        order, conversation = await order_chat(
            chat, request, services, caller, deadline, prefix="resp_"
        )
    except TemplateRefused as error:
        refusal = from_adapter_error(error)
        refusal.param = chat.conversation_field
        raise refusal from None
    with Generation(services, order) as generation:
        writer = ResponseWriter(chat, echo, order, conversation)
        return await respond(request, chat, generation, writer)


@router.delete(
    "/v1/responses/{id:path}",
    summary="Delete no response",
    status_code=404,
    response_model=None,
    responses=errors(404),
)
@router.get(
    "/v1/responses/{id:path}",
    summary="Find no response",
    status_code=404,
    response_model=None,
    responses=errors(404),
)
async def find_response(
    id: Annotated[str, Path(description="A response's id.", examples=["resp_2f1c"])],
) -> None:
    """Nothing is stored: there is never a response to find or delete."""
    raise ApiError(
        404,
        f"There is no response '{id[:200]}': this server stores none. Keep the answers of "
        "POST /v1/responses, and send what a conversation needs of them as 'input'.",
        code="not_stored",
        param="id",
    )


class ResponseChat(ChatBody):
    """The conversation of a Responses request, whose errors name that request's fields."""

    conversation_field = "input"

    asked: ResponseBody

    @property
    def token_limit(self) -> tuple[str, int | None]:
        return "max_output_tokens", self.asked.max_output_tokens

    @property
    def format_constraints(self) -> list[Constraint]:
        return self.asked.text.format.constraints

    def place_of_parameters(self, index: int) -> str:
        return f"tools[{index}].parameters"


def _as_chat(body: ResponseBody) -> ResponseChat:
    # What the fields hold has been validated.
    return ResponseChat.model_construct(
        **{name: getattr(body, name) for name in SamplingBody.model_fields},
        asked=body,
        messages=_messages(body),
        stream=body.stream,
        logprobs=body.logprobs,
        top_logprobs=body.top_logprobs,
        tools=[_tool(tool) for tool in body.tools],
        tool_choice=_choice(body),
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _messages(body: ResponseBody) -> list[Message]:
    """The instructions and the input as messages of a chat. The calls that follow an assistant's
    message, and what it thought before, are part of it."""
    messages: list[Message] = []
    if body.instructions:
        messages.append(Message(role="system", content=body.instructions))
    thought: str | None = None
    for item in body.input:
        match item:
            case PastReasoning():
                thought = item.content
            case CallOutput():
                messages.append(
                    Message(role="tool", tool_call_id=item.call_id, content=item.output)
                )
            case InputMessage():
                messages.append(
                    Message(role=item.role, content=item.content, reasoning_content=thought)
                )
                thought = None
            case PastCall():
                if not messages or messages[-1].role != "assistant":
                    messages.append(Message(role="assistant", reasoning_content=thought))
                calls = messages[-1].tool_calls or []
                messages[-1].tool_calls = [*calls, _past_call(item)]
                thought = None
    return messages


def _past_call(item: PastCall) -> PastToolCall:
    function = PastFunction(name=item.name, arguments=item.arguments)
    return PastToolCall(id=item.call_id, type="function", function=function)


def _tool(tool: FunctionTool) -> Tool:
    function = FunctionDefinition(
        name=tool.name,
        description=tool.description,
        parameters=tool.parameters,
        strict=tool.strict,
    )
    return Tool(type="function", function=function)


def _choice(body: ResponseBody) -> ToolChoice:
    if isinstance(body.tool_choice, FunctionChoice):
        named = FunctionName(name=body.tool_choice.name)
        return NamedToolChoice(type="function", function=named)
    return body.tool_choice
