"""What completions and chat completions have in common: the generation parameters, and usage."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
)

from server.api.constraint_schemas import StructuredOutputs

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 256
MAX_BIASED_TOKENS = 1024
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_MIXED_ADAPTERS = 16
MAX_WEIGHT = 16.0
INT32 = 2**31
INT64 = 2**63


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


def _check_logit_bias(bias: object) -> dict[int, float]:
    if not isinstance(bias, dict):
        raise ValueError('must map token ids to numbers, as in {"50": -100}')
    if len(bias) > MAX_BIASED_TOKENS:
        raise ValueError(f"has {len(bias)} tokens; at most {MAX_BIASED_TOKENS} can be biased")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 16):
            raise ValueError(f"{str(token)[:40]!r} is not a token id; write it as in " + '"50"')
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"the bias of token {token} must be a number")
        if not -100 <= value <= 100:
            raise ValueError(f"the bias of token {token} must lie between -100 and 100")
        checked[int(token)] = float(value)
    return checked


def _refuse_if_given(value: object) -> None:
    if value not in (None, "", [], {}):
        raise ValueError("not supported yet; leave it out")


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
StopStrings = Annotated[
    list[StopString],
    Field(fail_fast=True, max_length=MAX_STOP_STRINGS),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]
StopTokenIds = Annotated[list[int], Field(fail_fast=True, max_length=MAX_STOP_TOKENS)]
LogitBias = Annotated[
    dict[int, float], PlainValidator(_check_logit_bias, json_schema_input_type=dict[str, float])
]
NotYet = Annotated[Any, PlainValidator(_refuse_if_given, json_schema_input_type=Any)]
"""A field of the contract that this version cannot honour: refused, rather than ignored."""


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(strict=True)

    include_usage: bool = Field(
        False,
        description="Send a last chunk with the whole request's token usage and no choices.",
        examples=[True],
    )


class AdapterWeight(BaseModel):
    """One adapter of a mixture."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(
        min_length=1,
        max_length=256,
        description="An adapter's name, or `name@revision`.",
        examples=["support-intent"],
    )
    weight: float = Field(
        1.0,
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        description="How much of it: 0 is none, 1 all of it.",
        examples=[0.7],
    )


class ModelBody(BaseModel):
    """What a request runs on: the base model, an adapter, or a mixture of adapters."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, protected_namespaces=())

    model: str = Field(
        min_length=1,
        max_length=1024,
        description="The base model's name, an adapter's name, or `name@revision`.",
        examples=["support-intent"],
    )
    strength: float | None = Field(
        None,
        ge=-MAX_WEIGHT,
        le=MAX_WEIGHT,
        description="How much of the adapter that `model` names: 0 is the base, 1 (the default) "
        "the adapter, 2 twice what it changes.",
        examples=[0.5],
    )
    adapters: list[AdapterWeight] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MIXED_ADAPTERS,
        description="Mix several adapters for this request; `model` is the base then.",
        examples=[[{"name": "support-intent", "weight": 0.7}, {"name": "sentiment"}]],
    )
    composition: Literal["product", "linear"] | None = Field(
        None,
        description="How `adapters` are mixed. `product` (the default): the factors "
        "1 + weight * (l - 1) multiply, as in PEFT's `set_adapter` with several. `linear`: the "
        "weighted sum of the vectors, as in PEFT's `add_weighted_adapter`.",
        examples=["product"],
    )
    priority: int | None = Field(
        None,
        ge=-INT32,
        lt=INT32,
        description="Of the requests of one key, those with a lower number leave the queue "
        "earlier (default 0); now and then a waiting one with a higher number has a turn.",
        examples=[0],
    )
    cache_salt: str | None = Field(
        None,
        min_length=1,
        max_length=256,
        description="Only requests with the same salt share what was computed of their prompts.",
        examples=["tenant-7f3a"],
    )

    @property
    def choices_per_prompt(self) -> int:
        return 1


class GenerationBody(ModelBody):
    """What both generation endpoints take. Fields that are not listed here are ignored.

    Where a default is "the model's", it comes from the base model's `generation_config` if that
    says `do_sample`; otherwise it is OpenAI's.
    """

    stream: bool | None = Field(
        None,
        description="Send the answer as server-sent events while it is generated.",
        examples=[False],
    )
    stream_options: StreamOptions | None = Field(
        None,
        description="Options of a stream; only together with `stream`.",
        examples=[{"include_usage": True}],
    )
    n: int | None = Field(
        None,
        ge=1,
        le=MAX_CHOICES,
        description="How many choices to generate for each prompt (default 1).",
        examples=[1],
    )
    max_tokens: int | None = Field(
        None,
        ge=0,
        description="At most this many tokens are generated. 0 only scores the prompt (`echo`).",
        examples=[64],
    )
    max_completion_tokens: int | None = Field(
        None,
        ge=0,
        description="The newer name of `max_tokens`; wins where both are given.",
        examples=[64],
    )
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 is greedy; default: the model's, or 1.",
        examples=[0.7],
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Sample from the smallest set of tokens with this probability mass; default: "
        "the model's, or 1 (off).",
        examples=[0.95],
    )
    stop: StopStrings | None = Field(
        None,
        description=f"A string, or up to {MAX_STOP_STRINGS}, that ends the text; not part of it.",
        examples=[["\n\n"]],
    )
    seed: int | None = Field(
        None,
        ge=-INT64,
        lt=INT64,
        description="Makes sampling repeatable; choice i of a prompt is drawn with seed + i.",
        examples=[7],
    )
    presence_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Taken from the logits of tokens that were generated already (default 0).",
        examples=[0.0],
    )
    frequency_penalty: float | None = Field(
        None,
        ge=-2,
        le=2,
        description="Taken from a generated token's logit once for each time that it was "
        "generated (default 0).",
        examples=[0.0],
    )
    logit_bias: LogitBias | None = Field(
        None,
        description="Added to the logits: token id (as a string) to a number from -100 to 100.",
        examples=[{"50": -100}],
    )
    user: Any = Field(
        None, description="Taken for compatibility; has no effect.", examples=["user-1234"]
    )

    top_k: int | None = Field(
        None,
        ge=-1,
        description="Sample from the k likeliest tokens; 0 or -1 is off; default: the model's, "
        "or off.",
        examples=[40],
    )
    min_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Drop tokens less likely than this fraction of the likeliest one; default: "
        "the model's, or 0 (off).",
        examples=[0.05],
    )
    repetition_penalty: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Above 1, tokens of the prompt and the text become less likely; default: the "
        "model's, or 1 (off).",
        examples=[1.1],
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        description="No end token or stop token comes before this many tokens (default 0).",
        examples=[0],
    )
    ignore_eos: bool | None = Field(
        None, description="Go on past the model's end tokens.", examples=[False]
    )
    stop_token_ids: StopTokenIds | None = Field(
        None,
        description="Token ids that end the text, beside the model's own end tokens.",
        examples=[[2]],
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text (default true).", examples=[True]
    )

    speculation: bool | None = Field(
        None,
        description="Guess tokens from the text before, and compute several at once: the same "
        "answer, sooner where it copies or repeats. Default: as the server is set.",
        examples=[True],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="Hold the answer to a JSON schema, a regular expression, a choice or a "
        "grammar.",
        examples=[{"choice": ["positive", "negative"]}],
    )

    @field_validator("stream_options")
    @classmethod
    def _only_of_a_stream(
        cls, options: StreamOptions | None, info: ValidationInfo
    ) -> StreamOptions | None:
        if options is not None and not info.data.get("stream"):
            raise ValueError("needs stream: true; leave it out otherwise")
        return options

    @property
    def choices_per_prompt(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer's length, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionTokensDetails(BaseModel):
    """What became of a prediction."""

    accepted_prediction_tokens: int = Field(
        description="Tokens of the answers that the prediction foretold.", examples=[25]
    )
    rejected_prediction_tokens: int = Field(
        description="The prediction's other tokens, for each answer.", examples=[3]
    )


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(
        description="Prompt tokens that needed no computing: an earlier request had.", examples=[0]
    )


USAGE_EXAMPLE = {
    "prompt_tokens": 12,
    "completion_tokens": 30,
    "total_tokens": 42,
    "prompt_tokens_details": {"cached_tokens": 0},
}


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int = Field(
        description="Tokens of all prompts; a prompt with several choices counts once.",
        examples=[12],
    )
    completion_tokens: int = Field(
        description="Generated tokens of all choices, end tokens included.", examples=[30]
    )
    total_tokens: int = Field(description="Both together.", examples=[42])
    prompt_tokens_details: PromptTokensDetails = Field(
        description="What the prompt tokens are made of.", examples=[{"cached_tokens": 0}]
    )
    completion_tokens_details: CompletionTokensDetails | None = Field(
        None, description="Set where the request had a prediction.", examples=[None]
    )

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], completion_tokens: int, cached_tokens: int
    ) -> "Usage":
        prompt_tokens = sum(len(prompt) for prompt in prompts)
        return cls(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )


FinishedBecause = Literal["stop", "length"]
