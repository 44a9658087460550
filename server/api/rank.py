"""`POST /v1/rank`: which of the given choices the model finds likeliest.

Rank classification is how T-Few, IA3's paper, is evaluated (section 3.1 there): each choice is
scored by its mean log-probability after the prompt, and the best one is the answer.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Annotated, Literal

from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.answer_schemas import Usage
from infuse.server.api.answering import documented_answers, whole_answer
from infuse.server.api.checking import check_body
from infuse.server.api.deadlines import DeadlineDep
from infuse.server.api.disconnects import unless_client_leaves
from infuse.server.api.generation import Generation
from infuse.server.api.leasing import leased
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.orders import Order, Prompt, place_order
from infuse.server.api.preparing import prepared
from infuse.server.api.prompts import encode_choice, encode_pair
from infuse.server.api.texts import check_text
from infuse.server.auth import CallerDep
from infuse.server.engine import ServedModel
from infuse.server.engine.request import Output, SamplingParams
from infuse.server.services import ServicesDep

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
    "/v1/rank",
    summary="Rank choices",
    response_model=None,
    responses=documented_answers(RankAnswer),
)
async def rank(
    body: RankBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> Response:
    """Score choices by how likely the model finds them after the prompt."""
    choices = sum(len(each.choices) for each in body.inputs)
    check_body(body, choices, services.settings.max_queue)

    def prepare() -> Order:
        with leased(services, body, caller) as (lease, vocabulary):
            prompts = list(_prompts(services.engine.model, vocabulary, body))
            return place_order(
                services, body, caller, "rank-", prompts, lease, vocabulary, deadline
            )

    order = await prepared(request, services, caller, deadline, prepare)
    with Generation(services, order) as generation:
        outputs = await unless_client_leaves(request, generation.whole())
    answer = RankAnswer(
        id=order.id,
        object="rank",
        created=order.created,
        model=order.model,
        system_fingerprint=order.fingerprint,
        data=list(_rankings(body, order, outputs)),
        usage=generation.usage,
    )
    return whole_answer(generation, answer)


def _prompts(model: ServedModel, vocabulary: Vocabulary, body: RankBody) -> Iterator[Prompt]:
    """A prompt for each choice of each input, of which the choice's tokens alone are scored. Raises
    ApiError 400."""
    for i, each in enumerate(body.inputs):
        for j, choice in enumerate(each.choices):
            where = f"inputs[{i}].choices[{j}]"
            target: tuple[int, ...] = ()
            if model.decoder_start is None:
                ids, tokens = encode_choice(model, vocabulary, each.prompt, choice, where)
                first = len(ids) - tokens
            else:
                ids, target = encode_pair(model, vocabulary, each.prompt, choice, where)
                first = len(ids) + len(model.decoder_start)
            params = SamplingParams(
                max_tokens=0, temperature=0.0, prompt_logprobs=0, prompt_logprobs_from=first
            )
            yield Prompt(token_ids=ids, params=params, target=target)


def _rankings(body: RankBody, order: Order, outputs: Sequence[Output]) -> Iterator[Ranking]:
    """The scored choices of each input, from the outputs of all choices of all inputs."""
    scores = (
        _scores(request.params, output)
        for request, output in zip(order.requests, outputs, strict=True)
    )
    for index, each in enumerate(body.inputs):
        choices = []
        for j, logprobs in enumerate(islice(scores, len(each.choices))):
            logprob, tokens = sum(logprobs), len(logprobs)
            score = logprob / tokens if body.normalize == "tokens" else logprob
            choices.append(RankedChoice(index=j, score=score, logprob=logprob, tokens=tokens))
        best = max(choices, key=lambda choice: choice.score).index
        yield Ranking(index=index, best=best, choices=choices)


def _scores(params: SamplingParams, output: Output) -> list[float]:
    """The log-probabilities of the tokens of one choice."""
    assert output.prompt_logprobs is not None
    scored = output.prompt_logprobs[params.prompt_logprobs_from :]
    return [token.logprob for token in scored if token is not None]
