"""`POST /v1/rank`: which of the given choices the model finds likeliest.

Rank classification is how T-Few, IA3's paper, is evaluated (section 3.1 there): each choice is
scored by its mean log-probability after the prompt, and the best one is the answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from server.api.answer_schemas import Usage
from server.api.completion_schemas import check_text
from server.api.generation import (
    Generation,
    Order,
    check_order,
    describe,
    place_order,
    to_json,
)
from server.api.leasing import leased
from server.api.model_schemas import ModelBody
from server.api.preparing import prepared, unless_client_leaves
from server.api.prompts import encode_choice, encode_pair
from server.auth import Caller
from server.engine.request import Output, SamplingParams
from server.services import Services, get_services

MAX_INPUTS = 1024
MAX_CHOICES = 256

router = APIRouter(tags=["generation"])

Text = Annotated[
    str | list[int],
    AfterValidator(lambda text: check_text(text, "the text") if isinstance(text, str) else text),
]


class RankInput(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text = Field(
        description="A text or its token ids.", examples=["The food was cold. The review is"]
    )
    choices: list[Text] = Field(
        min_length=1,
        max_length=MAX_CHOICES,
        description="What may follow the prompt; text or token ids as the prompt is.",
        examples=[[" positive", " negative"]],
    )


class RankBody(ModelBody):
    """Prompts, each with the choices to score. Unknown fields are ignored."""

    inputs: list[RankInput] = Field(
        min_length=1,
        max_length=MAX_INPUTS,
        description="All of them are scored in one batch.",
        examples=[[{"prompt": "2 + 2 =", "choices": [" 4", " 5"]}]],
    )
    normalize: Literal["tokens", "none"] = Field(
        "tokens",
        description="`tokens`: a choice's score is its tokens' mean log-probability, as in "
        "T-Few; `none`: their sum.",
        examples=["tokens"],
    )


class RankedChoice(BaseModel):
    index: int = Field(description="Which of the choices.", examples=[0])
    score: float = Field(description="What the choices are ranked by.", examples=[-0.31])
    logprob: float = Field(description="The sum over its tokens.", examples=[-0.62])
    tokens: int = Field(description="How many tokens it has.", examples=[2])


class Ranking(BaseModel):
    index: int = Field(description="Which of the inputs.", examples=[0])
    best: int = Field(description="The index of the choice with the highest score.", examples=[0])
    choices: list[RankedChoice] = Field(
        description="In the order of the request.",
        examples=[[{"index": 0, "score": -0.31, "logprob": -0.62, "tokens": 2}]],
    )


class RankAnswer(BaseModel):
    id: str = Field(description="Names this answer.", examples=["rank-0123"])
    object: Literal["rank"] = Field(description="Kind.", examples=["rank"])
    created: int = Field(description="Unix time in seconds.", examples=[1764000000])
    model: str = Field(description="As in the request.", examples=["sentiment"])
    system_fingerprint: str = Field(description="What answered.", examples=["sentiment@1"])
    data: list[Ranking] = Field(
        description="One for each input, in order.",
        examples=[[{"index": 0, "best": 0, "choices": []}]],
    )
    usage: Usage = Field(
        description="Prompts with their choices count as prompt tokens.",
        examples=[{"prompt_tokens": 12, "completion_tokens": 0, "total_tokens": 12}],
    )


@router.post(
    "/v1/rank", summary="Rank choices", response_model=None, responses=describe(RankAnswer)
)
async def rank(
    body: RankBody,
    request: Request,
    services: Annotated[Services, Depends(get_services)],
    caller: Caller,
) -> Response:
    """Score choices by how likely the model finds them after the prompt."""
    check_order(services, body, sum(len(each.choices) for each in body.inputs))
    prepare = partial(_prepare, services, body, caller)
    order, scored = await prepared(request, services, caller, prepare)
    with Generation(services, order) as generation:
        outputs = await unless_client_leaves(request, generation.whole())
    answer = RankAnswer(
        id=order.id,
        object="rank",
        created=order.created,
        model=order.model,
        system_fingerprint=order.fingerprint,
        data=_rankings(body, outputs, scored),
        usage=generation.usage,
    )
    return Response(to_json(answer), media_type="application/json", headers=order.headers)


def _prepare(services: Services, body: RankBody, caller: str | None) -> tuple[Order, list[int]]:
    """The order, and how many of each prompt's last tokens are a choice's."""
    engine = services.engine
    prompts, targets, scored = [], [], []
    with leased(services, body) as (lease, vocabulary):
        for i, each in enumerate(body.inputs):
            for j, choice in enumerate(each.choices):
                where = f"inputs[{i}].choices[{j}]"
                texts = (each.prompt, choice)
                if engine.model.decoder_start is None:
                    ids, tokens = encode_choice(engine, vocabulary, *texts, where)
                    target: tuple[int, ...] = ()
                    first = len(ids) - tokens
                else:
                    ids, target = encode_pair(engine, vocabulary, *texts, where)
                    tokens, first = len(target), len(ids) + len(engine.model.decoder_start)
                params = SamplingParams(
                    max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_from=first
                )
                prompts.append((ids, params))
                targets.append(target)
                scored.append(tokens)
        order = place_order(services, body, caller, "rank", prompts, lease, vocabulary)
    requests = zip(order.requests, targets, strict=True)
    return replace(order, requests=tuple(replace(r, target=t) for r, t in requests)), scored


def _rankings(body: RankBody, outputs: Sequence[Output], scored: Sequence[int]) -> list[Ranking]:
    choices = []
    for output, tokens in zip(outputs, scored, strict=True):
        assert output.prompt_logprobs is not None
        last = output.prompt_logprobs[-tokens:]
        logprob = sum(token.logprob for token in last if token is not None)
        score = logprob / tokens if body.normalize == "tokens" else logprob
        choices.append((score, logprob, tokens))
    ends = accumulate(len(each.choices) for each in body.inputs)
    rankings = []
    for index, (each, end) in enumerate(zip(body.inputs, ends, strict=True)):
        mine = [
            RankedChoice(index=j, score=score, logprob=logprob, tokens=tokens)
            for j, (score, logprob, tokens) in enumerate(choices[end - len(each.choices) : end])
        ]
        best = max(mine, key=lambda choice: choice.score).index
        rankings.append(Ranking(index=index, best=best, choices=mine))
    return rankings
