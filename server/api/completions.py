"""`POST /v1/completions`."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from adapters.vocabulary.vocabulary import Vocabulary
from server.api.answer_schemas import Usage
from server.api.completion_schemas import (
    Completion,
    CompletionBody,
    CompletionLogprobs,
)
from server.api.constraining import Held, answer_grammar
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
from server.api.logprobs import CompletionLogprobWriter, TokenBytes
from server.api.preparing import prepared
from server.api.prompts import encode_prompts, fit_to_window, truncated
from server.api.sampling import sampling_params
from server.auth import Caller
from server.engine import Engine
from server.engine.request import Output, SamplingParams
from server.errors import ApiError
from server.services import Services, get_services

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default."""

router = APIRouter(tags=["generation"])


@router.post(
    "/v1/completions",
    summary="Continue a prompt",
    response_model=None,
    responses=describe(Completion),
)
async def create_completion(
    body: CompletionBody,
    request: Request,
    services: Annotated[Services, Depends(get_services)],
    caller: Caller,
) -> Response:
    """Continue one or several prompts with the base model or an adapter, as OpenAI's API does."""
    check_order(services, body, len(body.prompt))
    prepare = partial(_prepare, services, body, caller)
    order = await prepared(request, services, caller, prepare)
    with Generation(services, order) as generation:
        return await respond(request, body, generation, CompletionWriter(body, order))


def _prepare(services: Services, body: CompletionBody, caller: str | None) -> Order:
    with leased(services, body) as (lease, vocabulary):
        prompts = _prompts(services.engine, vocabulary, body)
        return place_order(
            services,
            body,
            caller,
            "cmpl",
            prompts,
            lease,
            vocabulary,
            speculation=body.speculation,
        )


def _prompts(
    engine: Engine, vocabulary: Vocabulary, body: CompletionBody
) -> list[tuple[tuple[int, ...], SamplingParams]]:
    """Each prompt's token ids, and how its first choice is sampled."""
    field, limit = body.token_limit
    prompt_logprobs = body.logprobs if body.echo else None
    if limit == 0:
        if not body.echo:
            raise ApiError(
                400,
                f"{field} 0 generates nothing; set echo to score the prompt alone, or raise it.",
                param=field,
            )
        prompt_logprobs = body.logprobs or 0
    if prompt_logprobs is not None and engine.model.decoder_start is not None:
        raise ApiError(
            400,
            "This model's encoder reads the prompt as a whole, so its tokens have no "
            "log-probabilities; leave out echo, or use /v1/rank to score a text after a prompt.",
            param="echo",
        )
    held = Held(answer_grammar(engine, body.constraints))
    room = DEFAULT_MAX_TOKENS if limit is None else limit
    prompts = encode_prompts(engine, vocabulary, body.prompt, body.add_special_tokens is not False)
    return [
        (
            prompt,
            sampling_params(
                engine,
                vocabulary,
                body,
                max_tokens=fit_to_window(engine, prompt, field, limit, DEFAULT_MAX_TOKENS),
                logprobs=body.logprobs,
                prompt_logprobs=prompt_logprobs,
                held=held,
            ),
        )
        for prompt in (truncated(engine, whole, body, room) for whole in prompts)
    ]


class CompletionWriter:
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

    def usage_chunk(self, usage: Usage) -> Chunk:
        return {**self._head, "choices": [], "usage": usage.model_dump(exclude_unset=True)}

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
