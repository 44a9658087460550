"""The bodies and answers of `POST /v1/completions`, in OpenAI's shape."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, PlainValidator, ValidationInfo, field_validator

from infuse.server.api.answer_schemas import (
    STOP_REASON,
    USAGE_EXAMPLE,
    FinishedBecause,
    StopReason,
    Usage,
)
from infuse.server.api.schemas import MAX_LOGPROBS, GenerationBody
from infuse.server.api.texts import check_text

Prompt = str | list[int]


def _check_token_ids(ids: list[object], where: str) -> list[int]:
    checked: list[int] = []
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int):
            raise ValueError(f"{where}[{index}] must be a token id, an integer")
        checked.append(token)
    return checked


def _check_prompt(value: object) -> list[Prompt]:
    """One text, several texts, one list of token ids, or several of them: always as a list."""
    if isinstance(value, str):
        return [check_text(value, "prompt")]
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a text, a list of texts, a list of token ids or a list of such lists, "
            "and not empty"
        )
    if isinstance(value[0], str):
        for index, text in enumerate(value):
            if not isinstance(text, str):
                raise ValueError(f"prompt[{index}] must be a text, as prompt[0] is")
            check_text(text, f"prompt[{index}]")
        return list(value)
    if isinstance(value[0], list):
        for index, ids in enumerate(value):
            if not isinstance(ids, list):
                raise ValueError(f"prompt[{index}] must be a list of token ids, as prompt[0] is")
        return [_check_token_ids(ids, f"prompt[{index}]") for index, ids in enumerate(value)]
    return [_check_token_ids(value, "prompt")]


class CompletionBody(GenerationBody):
    """Continue one or several prompts."""

    prompt: Annotated[
        list[Prompt],
        PlainValidator(
            _check_prompt, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
        ),
    ] = Field(
        description="The text to continue, or its token ids; or a list of either.",
        examples=["The capital of France is"],
    )
    echo: bool | None = Field(
        None,
        description="Put the prompt before the text; with `logprobs` the prompt is scored too.",
        examples=[False],
    )
    logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Report each token's log-probability and this many of the likeliest tokens.",
        examples=[1],
    )
    best_of: int | None = Field(
        None, ge=1, description="Only accepted where it equals `n`.", examples=[1]
    )

    @field_validator("best_of")
    @classmethod
    def _only_as_many_as_n(cls, best_of: int | None, info: ValidationInfo) -> int | None:
        if best_of is not None and best_of != (info.data.get("n") or 1):
            raise ValueError("is only supported where it equals n; leave it out")
        return best_of


class CompletionLogprobs(BaseModel):
    """One entry per token in each list."""

    tokens: list[str] = Field(
        description="The tokens' texts; bytes that are no character alone as `bytes:\\xe2`.",
        examples=[[" Paris", "."]],
    )
    token_logprobs: list[float | None] = Field(
        description="Natural logarithms of the model's probabilities, before constraints, "
        "temperature and filters; null for the first token of an echoed prompt.",
        examples=[[-0.12, -1.05]],
    )
    top_logprobs: list[dict[str, float] | None] = Field(
        description="The likeliest tokens at each place, and the one that was taken.",
        examples=[[{" Paris": -0.12}, {".": -1.05, ",": -1.2}]],
    )
    text_offset: list[int] = Field(
        description="Where each token begins in the choice's text, in characters.",
        examples=[[0, 6]],
    )


class CompletionChoice(BaseModel):
    """One continuation of one prompt."""

    index: int = Field(
        description="Choices are numbered prompt by prompt: prompt p, choice i is p * n + i.",
        examples=[0],
    )
    text: str = Field(
        description="The generated text, or in a stream its next part.", examples=[" Paris."]
    )
    logprobs: CompletionLogprobs | None = Field(
        description="The tokens' log-probabilities, where asked for.", examples=[None]
    )
    finish_reason: FinishedBecause | None = Field(
        description="`stop`: an end token or a stop string; `length`: the token limit. Null in a "
        "stream until the choice ends.",
        examples=["stop"],
    )
    stop_reason: StopReason = STOP_REASON


class Completion(BaseModel):
    """An answer, or one chunk of a stream: both have the same shape."""

    id: str = Field(description="This answer's id.", examples=["cmpl-2f1c"])
    object: Literal["text_completion"] = Field(
        description="Always `text_completion`.", examples=["text_completion"]
    )
    created: int = Field(description="Unix time in seconds.", examples=[1764000000])
    model: str = Field(description="The model as it was asked for.", examples=["support-intent"])
    system_fingerprint: str = Field(
        description="What answered: the adapter and its revision, or the base model.",
        examples=["support-intent@3"],
    )
    choices: list[CompletionChoice] = Field(
        description="The continuations; empty in a stream's usage chunk.",
        examples=[[{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "stop"}]],
    )
    usage: Usage | None = Field(
        None,
        description="Tokens taken; in a stream only in the last chunk, and only if asked for.",
        examples=[USAGE_EXAMPLE],
    )
