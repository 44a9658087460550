"""`POST /v1/chat/completions`."""

from dataclasses import replace

from fastapi import APIRouter, Request
from starlette.responses import Response

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.answering import documented_answers, respond
from infuse.server.api.chat_schemas import ChatBody, ChatCompletion
from infuse.server.api.chat_writer import ChatWriter, Conversation
from infuse.server.api.checking import check_body
from infuse.server.api.constraining import chat_grammar
from infuse.server.api.deadlines import Deadline, DeadlineDep
from infuse.server.api.generation import Generation
from infuse.server.api.leasing import leased
from infuse.server.api.orders import Order, Prompt, place_order
from infuse.server.api.preparing import prepared
from infuse.server.api.prompts import (
    encode_conversation,
    encode_prediction,
    fit_to_window,
    truncated,
)
from infuse.server.api.sampling import sampling_params
from infuse.server.api.tool_formats import CallFormat, find_format
from infuse.server.auth import CallerDep
from infuse.server.caller import Caller
from infuse.server.engine import Engine, ServedModel
from infuse.server.errors import ApiError
from infuse.server.services import Services, ServicesDep

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a conversation",
    response_model=None,
    responses=documented_answers(ChatCompletion),
)
async def create_chat_completion(
    body: ChatBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> Response:
    """Answer a conversation with the base model or an adapter, as OpenAI's API does."""
    order, conversation = await order_chat(
        body, request, services, caller, deadline, prefix="chatcmpl-"
    )
    with Generation(services, order) as generation:
        return await respond(request, body, generation, ChatWriter(body, order, conversation))


async def order_chat(
    body: ChatBody,
    request: Request,
    services: Services,
    caller: Caller,
    deadline: Deadline,
    *,
    prefix: str,
) -> tuple[Order, Conversation]:
    """Check a conversation and prepare its answer, whose id begins with `prefix`. Raises ApiError
    and AdapterError."""
    check_body(body, 1, services.settings.max_queue)

    def prepare() -> tuple[Order, Conversation]:
        with leased(services, body, caller) as (lease, vocabulary):
            prompt, conversation = _prompt(services.engine, vocabulary, body)
            order = place_order(
                services,
                body,
                caller,
                prefix,
                [prompt],
                lease,
                vocabulary,
                deadline,
                speculation=body.speculation,
            )
            return order, conversation

    return await prepared(request, services, caller, deadline, prepare)


def _prompt(engine: Engine, vocabulary: Vocabulary, body: ChatBody) -> tuple[Prompt, Conversation]:
    """The conversation as a prompt, and what its answer is read with. Raises ApiError 400."""
    model = engine.model
    field, limit = body.token_limit
    if limit == 0:
        raise ApiError(400, f"{field} must be at least 1.", param=field)
    text, whole = encode_conversation(model, vocabulary, body)
    token_ids = truncated(model, whole, body, limit or 1)
    max_tokens = fit_to_window(model, token_ids, field, limit, None)
    prediction = encode_prediction(model, vocabulary, body)
    calls = _call_format(model, vocabulary, body)
    params = sampling_params(
        model,
        vocabulary,
        body,
        max_tokens=max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        held=chat_grammar(engine.grammars, body, calls),
    )
    if calls is not None:
        # The marks of a call may be special tokens.
        params = replace(params, skip_special_tokens=False)
    prompt = Prompt(token_ids=token_ids, params=params, prediction=prediction)
    return prompt, Conversation(text, calls)


def _call_format(model: ServedModel, vocabulary: Vocabulary, body: ChatBody) -> CallFormat | None:
    """How the model writes calls of the tools that the request offers; None where it offers none.
    Raises ApiError 400."""
    if not body.offered_tools:
        return None
    calls = find_format(vocabulary, model.tokenizer.get_added_vocab())
    if calls is None:
        raise ApiError(
            400,
            "How this model writes tool calls is not known: its tokenizer has no "
            "response_template, and its chat template writes none as Hermes, Mistral or Llama 3 "
            "do. Leave the tools out.",
            param="tools",
        )
    return calls
