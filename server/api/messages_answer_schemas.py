"""The answers of `POST /v1/messages`, in Anthropic's shape."""

from typing import Any, Literal

from pydantic import BaseModel, Field


class Usage(BaseModel):
    """How many tokens a request took. A prompt's are the cached and the other ones together."""

    input_tokens: int = Field(
        description="Tokens of the prompt that were not cached.", examples=[12]
    )
    cache_read_input_tokens: int = Field(
        description="Prompt tokens found in the prefix cache.", examples=[0]
    )
    cache_creation_input_tokens: int = Field(
        description="Always 0: what is kept for later requests is not counted.", examples=[0]
    )
    output_tokens: int = Field(description="Generated tokens, end token included.", examples=[30])


class SaidBlock(BaseModel):
    """A text of the answer."""

    type: Literal["text"] = Field(description="Always `text`.", examples=["text"])
    text: str = Field(description="The text.", examples=["Paris."])


class CallBlock(BaseModel):
    """A call that the model made."""

    type: Literal["tool_use"] = Field(description="Always `tool_use`.", examples=["tool_use"])
    id: str = Field(
        description="Names the call: its result comes back with it.", examples=["a81bc3f02"]
    )
    name: str = Field(description="The tool's name.", examples=["get_weather"])
    input: dict[str, Any] = Field(
        description="Its arguments; cut where the token limit cut the answer.",
        examples=[{"city": "Paris"}],
    )


EndReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class AnthropicAnswer(BaseModel):
    """A whole answer."""

    id: str = Field(description="This answer's id.", examples=["msg-2f1c"])
    type: Literal["message"] = Field(description="Always `message`.", examples=["message"])
    role: Literal["assistant"] = Field(description="Always `assistant`.", examples=["assistant"])
    model: str = Field(description="The model as it was asked for.", examples=["support-intent"])
    content: list[SaidBlock | CallBlock] = Field(
        description="The text, then the calls; neither where there is none.",
        examples=[[{"type": "text", "text": "Paris."}]],
    )
    stop_reason: EndReason = Field(
        description="`end_turn`: an end token; `max_tokens`: the token limit; `stop_sequence`: one "
        "of `stop_sequences`; `tool_use`: a stop after calls.",
        examples=["end_turn"],
    )
    stop_sequence: str | None = Field(
        description="Which one ended the text, if one did.", examples=[None]
    )
    usage: Usage = Field(
        description="Tokens taken.",
        examples=[
            {
                "input_tokens": 12,
                "cache_read_input_tokens": 0,
                "cache_creation_input_tokens": 0,
                "output_tokens": 30,
            }
        ],
    )


class TokenCount(BaseModel):
    """How long a conversation is."""

    input_tokens: int = Field(
        description="Tokens of the prompt, as the model's chat template writes it.", examples=[12]
    )
