"""The generation parameters that completions and chat completions share."""

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

from infuse.server.api.constraint_schemas import (
    Alternatives,
    Constraint,
    ResponseFormat,
    StructuredOutputs,
)
from infuse.server.api.model_schemas import ModelBody

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKENS = 256
MAX_BIASED_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_CHOICES = 128
MAX_LOGPROBS = 20
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
AllowedTokenIds = Annotated[list[int], Field(fail_fast=True, min_length=1)]
BadWords = Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_BAD_WORDS)]


class StreamOptions(BaseModel):
    """How a stream is sent."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(
        None,
        description="Send a last chunk with the whole request's token usage and no choices; the "
        "chunks before it have the usage null.",
        examples=[True],
    )
    continuous_usage_stats: bool | None = Field(
        None,
        description="With `include_usage`: each chunk has the usage up to it instead of null.",
        examples=[False],
    )


class SamplingBody(ModelBody):
    """How an answer is generated.

    Where a default is "the model's", it comes from the base model's `generation_config` if that
    says `do_sample`; otherwise it is OpenAI's.
    """

    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="0 is greedy; default: the model's, or 1.",
        examples=[0.7],
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Sample from the smallest set of tokens with this probability mass; 0 is "
        "greedy; default: the model's, or 1 (off).",
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
        ge=0.01,
        le=10,
        description="Above 1, tokens of the prompt and the text become less likely; default: the "
        "model's, or 1 (off).",
        examples=[1.1],
    )
    min_tokens: int | None = Field(
        None,
        ge=0,
        description="No end token, stop token or stop string ends the text before this many "
        "tokens (default 0).",
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
    include_stop_str_in_output: bool | None = Field(
        None,
        description="Leave what ended the text, a stop string or stop token, at its end (default "
        "false).",
        examples=[False],
    )
    skip_special_tokens: bool | None = Field(
        None, description="Leave special tokens out of the text (default true).", examples=[True]
    )
    allowed_token_ids: AllowedTokenIds | None = Field(
        None,
        description="The answer has no other tokens than these; name an end token among them if "
        "it may end.",
        examples=[[2, 17, 42]],
    )
    bad_words: BadWords | None = Field(
        None,
        description="The answer has none of these words, at its beginning or after a blank.",
        examples=[["sorry"]],
    )
    truncate_prompt_tokens: int | None = Field(
        None,
        ge=-1,
        description="Keep only so many tokens of a longer prompt; -1: as many as the window "
        "holds. With `echo`, the text is theirs.",
        examples=[512],
    )
    truncation_side: Literal["left", "right"] | None = Field(
        None,
        description="Where `truncate_prompt_tokens` cuts: `left` (the default) keeps the last "
        "tokens, `right` the first.",
        examples=["left"],
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Add the tokenizer's begin and end tokens to a text prompt (default true), or "
        "to what a chat template wrote (default false).",
        examples=[True],
    )

    speculation: bool | None = Field(
        None,
        description="Draft tokens from the earlier text and verify several in one step: the same "
        "answer, sooner where it copies or repeats. Default: the server's setting.",
        examples=[True],
    )
    structured_outputs: StructuredOutputs | None = Field(
        None,
        description="Hold the answer to a JSON schema, a regular expression, a choice or a "
        "grammar.",
        examples=[{"choice": ["positive", "negative"]}],
    )
    guided_json: dict[str, Any] | str | None = Field(
        None,
        description="vLLM's older name of `json` in `structured_outputs`.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    guided_regex: str | None = Field(
        None,
        description="vLLM's older name of `regex` in `structured_outputs`.",
        examples=["[0-9]{4}"],
    )
    guided_choice: Alternatives | None = Field(
        None,
        description="vLLM's older name of `choice` in `structured_outputs`.",
        examples=[["positive", "negative"]],
    )
    guided_grammar: str | None = Field(
        None,
        description="vLLM's older name of `grammar` in `structured_outputs`.",
        examples=['start: "yes" | "no"'],
    )

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _keeps_something(cls, tokens: int | None) -> int | None:
        if tokens == 0:
            raise ValueError("must be at least 1, or -1 for as many as fit")
        return tokens


class GenerationBody(SamplingBody):
    """What completions and chat completions take. Fields that are not listed here are ignored, or
    refused where OpenAI or another server would answer differently for them."""

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
    response_format: ResponseFormat | None = Field(
        None,
        description="Hold the answer to JSON, or to a JSON schema.",
        examples=[{"type": "json_object"}],
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
    def constraints(self) -> list[Constraint]:
        """What the answer must match; more than one constraint is refused later."""
        guided = StructuredOutputs.model_construct(
            json_=self.guided_json,
            regex=self.guided_regex,
            choice=self.guided_choice,
            grammar=self.guided_grammar,
        )
        return [
            *self.format_constraints,
            *([] if self.structured_outputs is None else self.structured_outputs.constraints()),
            *guided.constraints("guided_"),
        ]

    @property
    def format_constraints(self) -> list[Constraint]:
        """Those of `constraints` that are the form of the answer's text: OpenAI's."""
        return [] if self.response_format is None else self.response_format.constraints

    @property
    def is_constrained(self) -> bool:
        """Whether the answer must match a grammar."""
        return bool(self.constraints)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """The field that bounds the answer's length, and its value."""
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def chunk_usage(self) -> dict[str, None]:
        """The usage field of every chunk but the last."""
        return {"usage": None} if self.wants_usage_chunk else {}

    @property
    def wants_usage_in_all_chunks(self) -> bool:
        options = self.stream_options
        return self.wants_usage_chunk and bool(options and options.continuous_usage_stats)
