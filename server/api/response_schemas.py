"""The body of `POST /v1/responses`, in the shape of OpenAI's Responses API."""

from typing import Annotated, Any, Literal, Self

import pydantic_core
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from infuse.server.api.chat_schemas import MAX_MESSAGES, join_parts
from infuse.server.api.constraint_schemas import ANY_OBJECT, Constraint
from infuse.server.api.schemas import MAX_LOGPROBS, SamplingBody
from infuse.server.api.tool_schemas import (
    MAX_TOOLS,
    FunctionDefinition,
    FunctionName,
    PastFunction,
    check_choice,
    check_names,
)

_TEXT = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Type of part -> the field of its text."""
_LOGPROBS = "message.output_text.logprobs"


def _join_texts(content: object) -> object:
    return join_parts(content, _TEXT)


def _join_thoughts(content: object) -> object:
    return join_parts(content, {"reasoning_text": "text"})


class InputText(BaseModel):
    """A part of a message's content."""

    type: Literal["input_text", "output_text"] = Field(
        description="Only text is supported.", examples=["input_text"]
    )
    text: str = Field(description="The text.", examples=["Where is my order?"])


_Text = Annotated[str, BeforeValidator(_join_texts, json_schema_input_type=str | list[InputText])]


class InputMessage(BaseModel):
    """One turn of the conversation."""

    model_config = ConfigDict(strict=True)

    type: Literal["message"] = Field(
        "message", description="May be left out.", examples=["message"]
    )
    role: Literal["developer", "system", "user", "assistant"] = Field(
        description="Who speaks; `developer` is another word for `system`.", examples=["user"]
    )
    content: _Text = Field(
        description="The text, or a list of text parts.", examples=["Where is my order?"]
    )


class PastCall(PastFunction):
    """A call that an earlier answer made."""

    type: Literal["function_call"] = Field(
        description="Always `function_call`.", examples=["function_call"]
    )
    call_id: str = Field(description="Names the call.", examples=["a81bc3f02"])


class CallOutput(BaseModel):
    """What a called function returned."""

    model_config = ConfigDict(strict=True)

    type: Literal["function_call_output"] = Field(
        description="Always `function_call_output`.", examples=["function_call_output"]
    )
    call_id: str = Field(description="Which call it answers.", examples=["a81bc3f02"])
    output: _Text = Field(description="The text, or a list of text parts.", examples=["18 degrees"])


class PastReasoning(BaseModel):
    """What a model thought before it answered. Summaries and what is encrypted are ignored."""

    type: Literal["reasoning"] = Field(description="Always `reasoning`.", examples=["reasoning"])
    content: Annotated[
        str | None, BeforeValidator(_join_thoughts, json_schema_input_type=list[dict[str, Any]])
    ] = Field(
        None,
        description="Its text, in parts of type `reasoning_text`, for templates that show it.",
        examples=[[{"type": "reasoning_text", "text": "The customer asks for an order."}]],
    )


def _kind_of(item: object) -> str:
    """An item's type; a message need not say it."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else "message"


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[PastCall, Tag("function_call")]
    | Annotated[CallOutput, Tag("function_call_output")]
    | Annotated[PastReasoning, Tag("reasoning")],
    Discriminator(
        _kind_of,
        custom_error_type="item_type",
        custom_error_message="is no item that is read here: send items of the types message, "
        "function_call, function_call_output and reasoning, whole and not by reference",
    ),
]


def _as_items(given: object) -> object:
    """A text is one message of the user."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class FunctionTool(FunctionDefinition):
    """A function that the model may call."""

    type: Literal["function"] = Field(
        description="Only functions, which the client runs.", examples=["function"]
    )

    @model_validator(mode="before")
    @classmethod
    def _runs_at_the_client(cls, given: object) -> object:
        kind = given.get("type") if isinstance(given, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise ValueError(
                f"{kind[:40]!r} is not served here, only functions that your program runs: "
                '{"type": "function", "name": "…", "parameters": {…}}'
            )
        return given


def _have_different_names(tools: list[FunctionTool]) -> list[FunctionTool]:
    check_names([tool.name for tool in tools])
    return tools


class FunctionChoice(FunctionName):
    """The one function to call."""

    type: Literal["function"] = Field(description="Only functions.", examples=["function"])


def _is_choice(value: object) -> object:
    is_named = isinstance(value, dict) and value.get("type") == "function"
    if value is None or value in ("none", "auto", "required") or is_named:
        return value
    raise ValueError(
        'must be "none", "auto", "required" or {"type": "function", "name": "…"}; to allow some '
        "tools only, leave the others out of tools"
    )


class TextFormat(BaseModel):
    """The form of the answer's text."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "json_object", "json_schema"] = Field(
        description="`text` is anything, `json_object` any JSON object, `json_schema` JSON that "
        "validates.",
        examples=["json_schema"],
    )
    name: str | None = Field(
        None, max_length=256, description="For people; has no effect.", examples=["order"]
    )
    schema_: dict[str, Any] | None = Field(
        None,
        alias="schema",
        description="With the type `json_schema`: what the text must validate against. A keyword "
        "that cannot be held is refused.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None,
        description="Taken for compatibility: every answer matches its schema.",
        examples=[True],
    )

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise ValueError("a schema comes with the type json_schema, and only with it")
        return self

    @property
    def constraints(self) -> list[Constraint]:
        match self:
            case TextFormat(type="text"):
                return []
            case TextFormat(schema_=dict(schema)):
                return [Constraint("json", schema, "text.format.schema")]
            case _:
                return [Constraint("json", ANY_OBJECT, "text.format")]


_PLAIN = TextFormat(type="text")


class TextConfig(BaseModel):
    """What the answer's text is like."""

    model_config = ConfigDict(strict=True)

    format: TextFormat = Field(
        _PLAIN, description="Hold it to JSON, or to a JSON schema.", examples=[{"type": "text"}]
    )
    verbosity: Literal["medium"] | None = Field(
        None,
        description="Others than `medium` are refused: say in the input how long the answer shall "
        "be.",
        examples=["medium"],
    )


class ResponseBody(SamplingBody):
    """Answer a conversation. Nothing is stored: `input` is the whole of it."""

    input: Annotated[
        list[Item],
        Field(fail_fast=True),
        BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
    ] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A text, or the items of the conversation so far: messages, calls of "
        "functions, and what those returned.",
        examples=["What is the capital of France?"],
    )
    instructions: str | None = Field(
        None,
        description="A system message before the input.",
        examples=["Answer in one word."],
    )
    stream: bool | None = Field(
        None,
        description="Send the answer as typed server-sent events while it is generated.",
        examples=[False],
    )
    max_output_tokens: int | None = Field(
        None, ge=1, description="At most this many tokens are generated.", examples=[64]
    )
    text: TextConfig = Field(
        TextConfig(),
        description="The form of the answer's text.",
        examples=[{"format": {"type": "json_object"}}],
    )
    tools: Annotated[
        list[FunctionTool], Field(fail_fast=True), AfterValidator(_have_different_names)
    ] = Field(
        [],
        max_length=MAX_TOOLS,
        description="Functions that the model may call, if its chat template has a place for them.",
        examples=[[{"type": "function", "name": "get_weather"}]],
    )
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | FunctionChoice | None, BeforeValidator(_is_choice)
    ] = Field(
        None,
        description="`auto` (the default): the model decides; `none`: the tools are not offered; "
        "`required`, or one function: the answer is calls. Their arguments fit the schemas.",
        examples=["auto"],
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether there may be several calls (default true).", examples=[True]
    )
    include: list[str] | None = Field(
        None,
        max_length=64,
        description=f"`{_LOGPROBS}`: report each token's log-probability. Others name what no "
        "answer here has.",
        examples=[[_LOGPROBS]],
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="How many of the likeliest tokens to report beside each; needs `include` with "
        f"`{_LOGPROBS}`.",
        examples=[3],
    )
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = Field(
        None, description="Stands in the answer again.", examples=[{"ticket": "4711"}]
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        max_length=64,
        description="Further variables for the chat template.",
        examples=[{"enable_thinking": False}],
    )

    @field_validator("tool_choice")
    @classmethod
    def _names_a_tool(
        cls, choice: str | FunctionChoice | None, info: ValidationInfo
    ) -> str | FunctionChoice | None:
        named = choice.name if isinstance(choice, FunctionChoice) else None
        names = [tool.name for tool in info.data.get("tools", [])]
        check_choice(choice == "required", named, names)
        return choice

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top and _LOGPROBS not in (info.data.get("include") or ()):
            raise ValueError(f'needs include: ["{_LOGPROBS}"]')
        return top

    @property
    def logprobs(self) -> bool:
        return _LOGPROBS in (self.include or ())

    @property
    def echo(self) -> dict[str, Any]:
        """The fields that stand in the answer again. Raises ValueError where JSON cannot be written
        of them."""
        choice = self.tool_choice or "auto"
        text = self.text.model_dump(by_alias=True, exclude_none=True)
        fields = {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": text,
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in self.tools],
            "top_logprobs": self.top_logprobs or 0,
        }
        pydantic_core.to_json(fields)
        return fields
