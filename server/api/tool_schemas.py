"""Tools and their calls, in OpenAI's shape."""

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

MAX_TOOLS = 128
FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,64}$"
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionDefinition(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True)

    name: str = Field(pattern=FUNCTION_NAME, description="Its name.", examples=["get_weather"])
    description: str | None = Field(
        None, description="What it does, for the model.", examples=["The weather of a city."]
    )
    parameters: dict[str, Any] | None = Field(
        None,
        description="A JSON schema of its arguments; none where it takes none.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    strict: bool | None = Field(
        None,
        description="Refuse a schema that arguments cannot be held to. Without it, that is "
        "refused with `tool_choice` `required` or a name only; with `auto`, such arguments are any "
        "object.",
        examples=[True],
    )


class Tool(BaseModel):
    """Something that the model may use."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"] = Field(description="Only functions.", examples=["function"])
    function: FunctionDefinition = Field(
        description="The function.", examples=[{"name": "get_weather"}]
    )

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function = self.function.model_dump(exclude_none=True, exclude={"strict"})
        return {"type": "function", "function": {"parameters": NO_PARAMETERS} | function}


class FunctionName(BaseModel):
    model_config = ConfigDict(strict=True)

    name: str = Field(description="One of the tools' names.", examples=["get_weather"])


class NamedToolChoice(BaseModel):
    """The one function to call."""

    model_config = ConfigDict(strict=True)

    type: Literal["function"] = Field(description="Only functions.", examples=["function"])
    function: FunctionName = Field(description="Which.", examples=[{"name": "get_weather"}])


def _is_choice(value: object) -> object:
    if value is None or value in ("none", "auto", "required") or isinstance(value, dict):
        return value
    raise ValueError(
        'must be "none", "auto", "required" or {"type": "function", "function": {"name": "…"}}'
    )


def check_names(names: Sequence[str]) -> None:
    """Check the names of all tools. Raises ValueError where two are alike."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise ValueError(f"[{index}] is a second function named {name!r}; rename one")


def check_choice(is_required: bool, named: str | None, names: Sequence[str]) -> None:
    """Check that there is a tool to call. `named`: the one function to call. Raises ValueError."""
    if is_required and not names:
        raise ValueError("is required, but there are no tools")
    if named is not None and named not in names:
        raise ValueError(f"names {named[:80]!r}, but the tools are {names}")


def _have_different_names(tools: Sequence[Tool]) -> Sequence[Tool]:
    check_names([tool.function.name for tool in tools])
    return tools


def new_call_id() -> str:
    """A new call's id: nine letters and digits, as Mistral's templates demand."""
    return uuid.uuid4().hex[:9]


def _is_object(arguments: str) -> str:
    """Check an earlier call's arguments. OpenAI's models write nothing where there are none."""
    if not arguments.strip():
        return "{}"
    try:
        if isinstance(json.loads(arguments), dict):
            return arguments
    except (ValueError, RecursionError):
        pass
    raise ValueError('must be the text of a JSON object, as in "{\\"city\\": \\"Paris\\"}"')


Tools = Annotated[
    list[Tool], Field(fail_fast=True, max_length=MAX_TOOLS), AfterValidator(_have_different_names)
]
ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedToolChoice | None, BeforeValidator(_is_choice)
]


class CalledFunction(BaseModel):
    """What is called, and with what."""

    model_config = ConfigDict(strict=True)

    name: str = Field(min_length=1, description="The function's name.", examples=["get_weather"])
    arguments: str = Field(
        description="Its arguments, as the text of a JSON object; cut where the token limit cut "
        "the answer.",
        examples=['{"city": "Paris"}'],
    )


class ToolCall(BaseModel):
    """A call that the model made."""

    model_config = ConfigDict(strict=True)

    id: str = Field(
        description="Names the call: its result comes back with it.", examples=["a81bc3f02"]
    )
    type: Literal["function"] = Field(description="Always `function`.", examples=["function"])
    function: CalledFunction = Field(
        description="The call.",
        examples=[{"name": "get_weather", "arguments": '{"city": "Paris"}'}],
    )


class PastFunction(CalledFunction):
    """What was called in the conversation so far."""

    arguments: Annotated[str, AfterValidator(_is_object)] = Field(
        description="Its arguments, as the text of a JSON object; empty where it took none.",
        examples=['{"city": "Paris"}'],
    )


class PastToolCall(ToolCall):
    """A call in the conversation so far."""

    function: PastFunction = Field(
        description="The call.",
        examples=[{"name": "get_weather", "arguments": '{"city": "Paris"}'}],
    )

    def for_template(self) -> dict[str, Any]:
        """The call as chat templates expect it: the arguments as an object."""
        arguments = json.loads(self.function.arguments)
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
