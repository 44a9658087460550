"""`POST /v1/completions`."""

from fastapi import APIRouter, Request
from starlette.responses import Response

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.answering import documented_answers, respond
from infuse.server.api.checking import check_body
from infuse.server.api.completion_schemas import Completion, CompletionBody
from infuse.server.api.completion_writer import CompletionWriter
from infuse.server.api.constraining import Held, answer_grammar
from infuse.server.api.deadlines import DeadlineDep
from infuse.server.api.generation import Generation
from infuse.server.api.leasing import leased
from infuse.server.api.orders import Order, Prompt, place_order
from infuse.server.api.preparing import prepared
from infuse.server.api.prompts import encode_prompts, fit_to_window, truncated
from infuse.server.api.sampling import sampling_params
from infuse.server.auth import CallerDep
from infuse.server.engine import Engine, ServedModel
from infuse.server.errors import ApiError
from infuse.server.services import ServicesDep

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default."""

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/completions",
    summary="Continue a prompt",
    response_model=None,
    responses=documented_answers(Completion),
)
async def create_completion(
    body: CompletionBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> Response:
    """Continue one or several prompts with the base model or an adapter, as OpenAI's API does."""
    check_body(body, len(body.prompt), services.settings.max_queue)

    def prepare() -> Order:
        with leased(services, body, caller) as (lease, vocabulary):
            prompts = _prompts(services.engine, vocabulary, body)
            return place_order(
                services,
                body,
                caller,
                "cmpl-",
                prompts,
                lease,
                vocabulary,
                deadline,
                speculation=body.speculation,
            )

    order = await prepared(request, services, caller, deadline, prepare)
    with Generation(services, order) as generation:
        return await respond(request, body, generation, CompletionWriter(body, order))


def _prompts(engine: Engine, vocabulary: Vocabulary, body: CompletionBody) -> list[Prompt]:
    """The prompts as token ids, and how each is sampled. Raises ApiError 400."""
    model = engine.model
    field, limit = body.token_limit
    prompt_logprobs = _prompt_logprobs(model, body)
    held = Held(answer_grammar(engine.grammars, body.constraints))
    room = DEFAULT_MAX_TOKENS if limit is None else limit
    prompts = []
    for whole in encode_prompts(
        model, vocabulary, body.prompt, body.add_special_tokens is not False
    ):
        token_ids = truncated(model, whole, body, room)
        params = sampling_params(
            model,
            vocabulary,
            body,
            max_tokens=fit_to_window(model, token_ids, field, limit, DEFAULT_MAX_TOKENS),
            logprobs=body.logprobs,
            prompt_logprobs=prompt_logprobs,
            held=held,
        )
        prompts.append(Prompt(token_ids=token_ids, params=params))
    return prompts


def _prompt_logprobs(model: ServedModel, body: CompletionBody) -> int | None:
    """How many alternatives are reported beside each token of the prompt; None where the prompt is
    not scored. Raises ApiError 400."""
    field, limit = body.token_limit
    wanted = body.logprobs if body.echo else None
    if limit == 0:
        if not body.echo:
            raise ApiError(
                400,
                f"{field} 0 generates nothing; set echo to score the prompt alone, or raise it.",
                param=field,
            )
        wanted = body.logprobs or 0
    if wanted is not None and model.decoder_start is not None:
        raise ApiError(
            400,
            "This model's encoder reads the prompt as a whole, so its tokens have no "
            "log-probabilities; leave out echo, or use /v1/rank to score a text after a prompt.",
            param="echo",
        )
    return wanted
