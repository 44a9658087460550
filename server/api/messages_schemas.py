"""The bodies and answers of `POST /v1/messages`, in Anthropic's shape."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from infuse.server.api.chat_schemas import MAX_CALLS, MAX_MESSAGES, ChatBody
from infuse.server.api.foreign_fields import NOTHING, REFUSED, Refusal, unserved
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.schemas import MAX_STOP_STRINGS, StopString
from infuse.server.api.tool_schemas import FUNCTION_NAME, MAX_TOOLS

HARMLESS_IN_MESSAGES = frozenset(
    {
        # For Anthropic's own records and machines.
        "betas",
        "billing_policy",
        "fallback_credit_token",
        "metadata",
        "service_tier",
        "speed",
        "user_profile_id",
        "workspace_id",
        # What is computed once is kept in any case, and arguments come as they are written.
        "cache_control",
        "eager_input_streaming",
        # What Anthropic's own answers say beside a text or a thought.
        "citations",
        "signature",
    }
)
_AT_THE_CLIENT = "leave it out; tools are called by the client"
_ONE_CONVERSATION = Refusal("leave it out, and send the conversation as it shall be read")
REFUSED_IN_MESSAGES: Mapping[str, Refusal] = {
    "allowed_callers": Refusal(_AT_THE_CLIENT, (*NOTHING, ["direct"])),
    "caller": Refusal(_AT_THE_CLIENT, (*NOTHING, {"type": "direct"})),
    "compaction": _ONE_CONVERSATION,
    "container": Refusal(_AT_THE_CLIENT),
    "context_management": _ONE_CONVERSATION,
    "defer_loading": Refusal("leave it out, or leave the tool out"),
    "diagnostics": Refusal("leave it out; cache_read_input_tokens says what was cached", (None,)),
    "effort": Refusal("say in a message how long the answer shall be"),
    "fallbacks": Refusal("leave it out; one model answers"),
    "inference_geo": Refusal("leave it out; this server alone answers"),
    "input_examples": Refusal("write them into the tool's description"),
    "mcp_servers": Refusal("let the client ask them, and offer their tools in 'tools'"),
    "output_format": Refusal("say it with 'output_config': {\"format\": …}"),
    "thread": _ONE_CONVERSATION,
    "toolset_name": Refusal(_AT_THE_CLIENT),
}


class _Part(BaseModel):
    """A part of a body. Fields of Anthropic's that are not served are refused where they ask for
    something."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="after")
    def _asks_for_what_is_served(self) -> Self:
        for name, refusal in unserved(self.model_extra or {}, REFUSED_IN_MESSAGES):
            raise ValueError(f"{name} is not served here: {refusal.mend}")
        return self


class TextBlock(_Part):
    """A text."""

    type: Literal["text"] = Field(description="Always `text`.", examples=["text"])
    text: str = Field(description="The text.", examples=["Where is my order?"])


class ThinkingBlock(_Part):
    """What an assistant's message thought, for templates that show it."""

    type: Literal["thinking"] = Field(description="Always `thinking`.", examples=["thinking"])
    thinking: str = Field(description="The thought.", examples=["The order was sent on Monday."])


class ToolUseBlock(_Part):
    """A call of a tool, in an assistant's message."""

    type: Literal["tool_use"] = Field(description="Always `tool_use`.", examples=["tool_use"])
    id: str = Field(
        description="Names the call: its result comes back with it.", examples=["a81bc3f02"]
    )
    name: str = Field(min_length=1, description="The tool's name.", examples=["get_weather"])
    input: dict[str, Any] = Field(description="Its arguments.", examples=[{"city": "Paris"}])


def _as_blocks(content: object) -> object:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Texts = Annotated[
    list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])
]


class ToolResultBlock(_Part):
    """What a tool has answered, in a user's message."""

    type: Literal["tool_result"] = Field(
        description="Always `tool_result`.", examples=["tool_result"]
    )
    tool_use_id: str = Field(description="Which call it answers.", examples=["a81bc3f02"])
    content: Texts | None = Field(
        None, description="A text, or a list of text blocks.", examples=["18 degrees"]
    )
    is_error: bool | None = Field(
        None,
        description="Whether the tool has failed; the model then reads `Error: ` before the text.",
        examples=[False],
    )


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]
_SPEAKERS = {
    "text": ("user", "assistant", "system"),
    "thinking": ("assistant",),
    "tool_use": ("assistant",),
    "tool_result": ("user",),
}


class AnthropicMessage(_Part):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: Annotated[
        list[Block],
        Field(fail_fast=True),
        BeforeValidator(_as_blocks, json_schema_input_type=str | list[Block]),
    ] = Field(
        description="A text, or a list of blocks.",
        examples=["Where is my order?"],
    )

    @field_validator("content")
    @classmethod
    def _fits_its_speaker(cls, blocks: list[Block], info: ValidationInfo) -> list[Block]:
        role = info.data.get("role")
        calls = 0
        for index, block in enumerate(blocks):
            speakers = _SPEAKERS[block.type]
            if role is not None and role not in speakers:
                raise ValueError(f"[{index}] is a {block.type} block, which a {role} has none of")
            calls += block.type == "tool_use"
        if calls > MAX_CALLS:
            raise ValueError(f"has {calls} tool_use blocks; at most {MAX_CALLS} are read")
        return blocks


class AnthropicTool(_Part):
    """A function that the model may call."""

    type: Literal["custom"] | None = Field(
        None, description="Only functions that the client calls.", examples=["custom"]
    )
    name: str = Field(pattern=FUNCTION_NAME, description="Its name.", examples=["get_weather"])
    description: str | None = Field(
        None, description="What it does, for the model.", examples=["The weather of a city."]
    )
    input_schema: dict[str, Any] = Field(
        description="A JSON schema of its arguments.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None,
        description="Refuse a schema that arguments cannot be held to.",
        examples=[True],
    )


class AnthropicToolChoice(_Part):
    """Whether the model calls tools."""

    type: Literal["auto", "any", "tool", "none"] = Field(
        description="`auto` (the default): the model decides; `any`, or one `tool`: the answer is "
        "calls; `none`: the tools are not offered.",
        examples=["auto"],
    )
    name: str | None = Field(
        None,
        validate_default=True,
        description="Which tool, with the type `tool`.",
        examples=["get_weather"],
    )
    disable_parallel_tool_use: bool | None = Field(
        None, description="Whether there is one call at most.", examples=[True]
    )

    @field_validator("name")
    @classmethod
    def _of_one_tool(cls, name: str | None, info: ValidationInfo) -> str | None:
        if (info.data.get("type") == "tool") != (name is not None):
            raise ValueError("comes with the type tool, and only with it")
        return name


class JsonFormat(_Part):
    """A JSON schema that the answer validates against."""

    type: Literal["json_schema"] = Field(
        description="Always `json_schema`.", examples=["json_schema"]
    )
    schema_: dict[str, Any] = Field(
        alias="schema",
        description="The schema.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )


class OutputConfig(_Part):
    """The form of the answer."""

    format: JsonFormat | None = Field(
        None,
        description="Hold the answer to a JSON schema.",
        examples=[{"type": "json_schema", "schema": {"type": "object"}}],
    )


class NoThinking(_Part):
    """No thoughts before the answer."""

    type: Literal["disabled"] = Field(
        description="Thoughts are not told from answers here.", examples=["disabled"]
    )


class CountTokensBody(ModelBody):
    """A conversation. Fields that are not listed here are ignored, or refused where Anthropic's API
    would answer differently for them."""

    messages: Annotated[list[AnthropicMessage], Field(fail_fast=True)] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation so far. Where the last message is the assistant's, the "
        "answer goes on with it.",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    system: Texts | None = Field(
        None,
        description="What the conversation begins with: a text, or a list of text blocks.",
        examples=["Answer briefly."],
    )
    tools: Annotated[list[AnthropicTool], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_TOOLS,
        description="Functions that the model may call, if its chat template has a place for them.",
        examples=[[{"name": "get_weather", "input_schema": {"type": "object"}}]],
    )
    tool_choice: AnthropicToolChoice | None = Field(
        None, description="Whether the model calls tools.", examples=[{"type": "auto"}]
    )
    output_config: OutputConfig | None = Field(
        None,
        description="The form of the answer.",
        examples=[{"format": {"type": "json_schema", "schema": {"type": "object"}}}],
    )
    thinking: NoThinking | None = Field(
        None,
        description="Sets `enable_thinking` to false for templates that know it.",
        examples=[{"type": "disabled"}],
    )

    @field_validator("messages")
    @classmethod
    def _can_go_on(cls, messages: list[AnthropicMessage]) -> list[AnthropicMessage]:
        others = [block.type for block in messages[-1].content if block.type != "text"]
        if messages[-1].role == "assistant" and others:
            raise ValueError(f"end with a {others[-1]} block of the assistant's: send what follows")
        return messages


class MessagesBody(CountTokensBody):
    """Answer a conversation. Fields that are not listed here are ignored, or refused where
    Anthropic's API would answer differently for them."""

    max_tokens: int = Field(
        ge=1, description="At most this many tokens are generated.", examples=[64]
    )
    stream: bool | None = Field(
        None,
        description="Send the answer as server-sent events while it is generated.",
        examples=[False],
    )
    stop_sequences: Annotated[list[StopString], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_STOP_STRINGS,
        description="Strings that end the text; not part of it.",
        examples=[["\n\n"]],
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 is greedy; default: the model's, or 1.", examples=[0.7]
    )
    top_p: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Sample from the smallest set of tokens with this probability mass; default: "
        "the model's, or 1 (off).",
        examples=[0.95],
    )
    top_k: int | None = Field(
        None,
        ge=-1,
        description="Sample from the k likeliest tokens; 0 or -1 is off; default: the model's, or "
        "off.",
        examples=[40],
    )


_OF_CHAT = Refusal("ask /v1/chat/completions, which knows it")
REFUSED_IN_BODY: Mapping[str, Refusal] = {
    **dict.fromkeys(ChatBody.model_fields.keys() - {"user"}, _OF_CHAT),
    **REFUSED,
    **REFUSED_IN_MESSAGES,
}
"""What a body itself is refused for: also the fields of other servers."""
