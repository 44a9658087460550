"""The answer of `POST /v1/responses`, in the shape of OpenAI's Responses API."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from infuse.server.api.chat_schemas import ChatTokenLogprob


class OutputText(BaseModel):
    """The text of an answer's message."""

    type: Literal["output_text"] = Field(
        description="Always `output_text`.", examples=["output_text"]
    )
    text: str = Field(description="The generated text.", examples=["Paris."])
    annotations: list[Any] = Field(description="Always empty.", examples=[[]])
    logprobs: list[ChatTokenLogprob] = Field(
        description="One entry per token, where asked for.", examples=[[]]
    )


ItemStatus = Literal["completed", "incomplete"]
_STATUS: Any = Field(
    description="`incomplete` where the token limit cut it.", examples=["completed"]
)


class OutputMessage(BaseModel):
    """What the model says."""

    id: str = Field(description="This item's id.", examples=["msg_2f1c"])
    type: Literal["message"] = Field(description="Always `message`.", examples=["message"])
    role: Literal["assistant"] = Field(description="Always `assistant`.", examples=["assistant"])
    status: ItemStatus = _STATUS
    content: list[OutputText] = Field(
        description="One text.",
        examples=[[{"type": "output_text", "text": "Paris.", "annotations": [], "logprobs": []}]],
    )


class OutputCall(BaseModel):
    """A function that the model calls."""

    id: str = Field(description="This item's id.", examples=["fc_2f1c"])
    type: Literal["function_call"] = Field(
        description="Always `function_call`.", examples=["function_call"]
    )
    status: ItemStatus = _STATUS
    call_id: str = Field(
        description="Names the call: its output comes back with it.", examples=["a81bc3f02"]
    )
    name: str = Field(description="The function's name.", examples=["get_weather"])
    arguments: str = Field(
        description="The text of a JSON object; cut where the token limit cut the answer.",
        examples=['{"city": "Paris"}'],
    )


class IncompleteDetails(BaseModel):
    """Why an answer is incomplete."""

    reason: Literal["max_output_tokens"] = Field(
        description="Always `max_output_tokens`.", examples=["max_output_tokens"]
    )


class InputTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Tokens found in the prefix cache.", examples=[0])
    cache_write_tokens: int = Field(description="Always 0.", examples=[0])


class OutputTokensDetails(BaseModel):
    reasoning_tokens: int = Field(description="Always 0.", examples=[0])


class ResponseUsage(BaseModel):
    """How many tokens a request took."""

    input_tokens: int = Field(description="Tokens of the prompt.", examples=[12])
    input_tokens_details: InputTokensDetails = Field(
        description="What the input tokens are made of.",
        examples=[{"cached_tokens": 0, "cache_write_tokens": 0}],
    )
    output_tokens: int = Field(description="Generated tokens, end tokens included.", examples=[30])
    output_tokens_details: OutputTokensDetails = Field(
        description="What the output tokens are made of.", examples=[{"reasoning_tokens": 0}]
    )
    total_tokens: int = Field(description="Both together.", examples=[42])


_USAGE = {
    "input_tokens": 12,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 30,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 42,
}


class Response(BaseModel):
    """A whole answer. The fields of the request stand in it again."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    id: str = Field(description="This answer's id.", examples=["resp_2f1c"])
    object: Literal["response"] = Field(description="Always `response`.", examples=["response"])
    created_at: int = Field(description="Unix time in seconds.", examples=[1764000000])
    model: str = Field(description="The model as it was asked for.", examples=["support-intent"])
    system_fingerprint: str = Field(
        description="What answered: the adapter and its revision, or the base model.",
        examples=["support-intent@3"],
    )
    status: Literal["completed", "incomplete"] = Field(
        description="`completed`, or `incomplete` where the token limit cut it.",
        examples=["completed"],
    )
    error: None = Field(description="Of a stream's `response.failed` only.", examples=[None])
    incomplete_details: IncompleteDetails | None = Field(
        description="Why it is incomplete.", examples=[None]
    )
    output: list[OutputMessage | OutputCall] = Field(
        description="What the model says and calls.", examples=[[]]
    )
    usage: ResponseUsage = Field(description="Tokens taken.", examples=[_USAGE])
    store: Literal[False] = Field(description="Nothing is stored.", examples=[False])
