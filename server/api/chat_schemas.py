"""The bodies and answers of `POST /v1/chat/completions`, in OpenAI's shape."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypedDict

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

from infuse.server.api.answer_schemas import (
    STOP_REASON,
    USAGE_EXAMPLE,
    FinishedBecause,
    StopReason,
    Usage,
)
from infuse.server.api.schemas import MAX_LOGPROBS, GenerationBody
from infuse.server.api.tool_schemas import (
    NamedToolChoice,
    PastToolCall,
    ToolCall,
    ToolChoice,
    Tools,
    check_choice,
)

MAX_MESSAGES = 4096
MAX_CALLS = 128

ChatFinishedBecause = FinishedBecause | Literal["tool_calls"]


class TextPart(BaseModel):
    """A part of a message's content."""

    type: Literal["text"] = Field(description="Only text is supported.", examples=["text"])
    text: str = Field(description="The text.", examples=["Where is my order?"])


def join_parts(content: object, fields: Mapping[str, str]) -> object:
    """The parts of a content as one text, joined by line breaks; what is no list, as it is.

    `fields`: type of part -> the field of its text. Raises ValueError.
    """
    if not isinstance(content, list):
        return content
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(part, dict) or not isinstance(kind, str) or kind not in fields:
            raise ValueError(
                f"part {index} is of type {str(kind)[:40]!r}; only text parts are supported: "
                f'{{"type": "{next(iter(fields))}", "text": "…"}}'
            )
        text = part.get(fields[kind])
        if not isinstance(text, str):
            raise ValueError(f"part {index} has no text")
        texts.append(text)
    return "\n".join(texts)


def _join_text_parts(content: object, info: ValidationInfo) -> object:
    """A message's content as one text."""
    if content is None:
        if info.data.get("role") == "assistant":
            return None
        raise ValueError("is missing; every message but an assistant's needs a text")
    return join_parts(content, {"text": "text", "refusal": "refusal"})


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["developer", "system", "user", "assistant", "tool"] = Field(
        description="Who speaks; `developer` is another word for `system`.", examples=["user"]
    )
    tool_calls: list[PastToolCall] | None = Field(
        None,
        max_length=MAX_CALLS,
        description="What an assistant's message called.",
        examples=[None],
    )
    tool_call_id: str | None = Field(
        None,
        validate_default=True,
        description="Which call a tool's message answers.",
        examples=["a81bc3f02"],
    )
    content: Annotated[
        str | None, BeforeValidator(_join_text_parts, json_schema_input_type=str | list[TextPart])
    ] = Field(
        None,
        validate_default=True,
        description="The text, or a list of text parts; an assistant's may be null.",
        examples=["Where is my order?"],
    )
    refusal: str | None = Field(
        None,
        description="What an assistant's message said instead of a content.",
        examples=[None],
    )
    reasoning_content: str | None = Field(
        None,
        description="What an assistant's message thought, for templates that show it.",
        examples=[None],
    )
    name: str | None = Field(
        None, description="The speaker's name, for templates that use it.", examples=["Ada"]
    )
    function_call: Any = Field(
        None, description="Not served, refused: use `tool_calls`.", examples=[None]
    )
    audio: Any = Field(None, description="Not served, refused: only text is read.", examples=[None])

    @field_validator("function_call", "audio")
    @classmethod
    def _is_not_served(cls, given: object, info: ValidationInfo) -> object:
        if given is not None:
            name = info.field_name
            mend = "use tool_calls" if name == "function_call" else "send its text"
            raise ValueError(f"is not served here; {mend}")
        return given

    @field_validator("tool_calls")
    @classmethod
    def _of_the_assistant(
        cls, calls: list[PastToolCall] | None, info: ValidationInfo
    ) -> list[PastToolCall] | None:
        if calls and info.data.get("role") != "assistant":
            raise ValueError("stand in an assistant's message only")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_tool(cls, call_id: str | None, info: ValidationInfo) -> str | None:
        if call_id is None and info.data.get("role") == "tool":
            raise ValueError("is missing; a tool's message names the call that it answers")
        return call_id

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it."""
        role = "system" if self.role == "developer" else self.role
        calls = [call.for_template() for call in self.tool_calls or ()]
        rest = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "tool_calls": calls,
            "reasoning_content": self.reasoning_content,
        }
        content = self.refusal if self.content is None else self.content
        return {"role": role, "content": content or ""} | {k: v for k, v in rest.items() if v}


class Prediction(BaseModel):
    """What an answer is expected to be."""

    type: Literal["content"] = Field(description="Only text is supported.", examples=["content"])
    content: Annotated[
        str, BeforeValidator(_join_text_parts, json_schema_input_type=str | list[TextPart])
    ] = Field(description="The text, or a list of text parts.", examples=["def total(items):\n"])


class ChatBody(GenerationBody):
    """Answer a conversation."""

    conversation_field: ClassVar[str] = "messages"
    """How errors name what the conversation stands in."""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="The conversation so far, rendered by the model's chat template.",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    logprobs: bool | None = Field(
        None, description="Report each token's log-probability.", examples=[True]
    )
    top_logprobs: int | None = Field(
        None,
        ge=0,
        le=MAX_LOGPROBS,
        description="How many of the likeliest tokens to report beside each; needs `logprobs`.",
        examples=[3],
    )
    add_generation_prompt: bool | None = Field(
        None,
        description="End the prompt with the template's opening of an answer (default true, or "
        "false with `continue_final_message`).",
        examples=[True],
    )
    continue_final_message: bool | None = Field(
        None,
        description="Go on with the text of the last message instead of answering it.",
        examples=[False],
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        max_length=64,
        description="Further variables for the chat template.",
        examples=[{"enable_thinking": False}],
    )
    prediction: Prediction | None = Field(
        None,
        description="A text that the answer will mostly repeat, such as a file to be edited: where "
        "it does, it comes sooner. It changes nothing else.",
        examples=[{"type": "content", "content": "def total(items):\n"}],
    )
    tools: Tools | None = Field(
        None,
        description="Functions that the model may call, if its chat template has a place for them.",
        examples=[[{"type": "function", "function": {"name": "get_weather"}}]],
    )
    tool_choice: ToolChoice = Field(
        None,
        description="`auto` (the default): the model decides; `none`: the tools are not offered; "
        "`required`, or one function: the answer is calls. Their arguments fit the schemas.",
        examples=["auto"],
    )
    parallel_tool_calls: bool | None = Field(
        None,
        description="Whether there may be several calls (default true).",
        examples=[True],
    )

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, top: int | None, info: ValidationInfo) -> int | None:
        if top and not info.data.get("logprobs"):
            raise ValueError("needs logprobs: true")
        return top

    @field_validator("tool_choice")
    @classmethod
    def _names_a_tool(cls, choice: ToolChoice, info: ValidationInfo) -> ToolChoice:
        names = [tool.function.name for tool in info.data.get("tools") or []]
        named = choice.function.name if isinstance(choice, NamedToolChoice) else None
        check_choice(choice == "required", named, names)
        return choice

    def place_of_parameters(self, index: int) -> str:
        """How errors name the schema of a tool's arguments."""
        return f"tools[{index}].function.parameters"

    @property
    def is_constrained(self) -> bool:
        return bool(self.offered_tools) or super().is_constrained

    @property
    def offered_tools(self) -> Tools:
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def tools_to_call(self) -> Tools:
        """The tools of which the answer must call at least one; none where the model decides."""
        match self.tool_choice:
            case "required":
                return self.offered_tools
            case NamedToolChoice(function=wanted):
                return [t for t in self.offered_tools if t.function.name == wanted.name]
            case _:
                return []

    @property
    def names_a_tool(self) -> bool:
        """Whether the request names the one function to call."""
        return isinstance(self.tool_choice, NamedToolChoice)

    @property
    def calls_several(self) -> bool:
        """Whether one answer may hold several calls."""
        return self.parallel_tool_calls is not False and not self.names_a_tool

    @field_validator("continue_final_message")
    @classmethod
    def _continue_or_answer(cls, goes_on: bool | None, info: ValidationInfo) -> bool | None:
        if goes_on and info.data.get("add_generation_prompt"):
            raise ValueError("excludes add_generation_prompt; set one of the two")
        return goes_on


class TopLogprob(BaseModel):
    """A token that could have been taken."""

    token: str = Field(description="The token's text.", examples=["Paris"])
    logprob: float = Field(
        description="The natural logarithm of its probability.", examples=[-0.12]
    )
    bytes: list[int] = Field(description="The token as UTF-8.", examples=[[80, 97, 114, 105, 115]])


class ChatTokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob] = Field(
        description="The likeliest tokens at this place, best first.",
        examples=[[{"token": "Paris", "logprob": -0.12, "bytes": [80, 97, 114, 105, 115]}]],
    )


class ChatLogprobs(BaseModel):
    """The log-probabilities of a choice's tokens."""

    content: list[ChatTokenLogprob] = Field(
        description="One entry per token, before constraints, temperature and filters.",
        examples=[[]],
    )


class AssistantMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = Field(description="Always `assistant`.", examples=["assistant"])
    content: str | None = Field(
        description="The generated text; null where there are calls only.", examples=["Paris."]
    )
    tool_calls: list[ToolCall] | None = Field(
        None, description="What the model calls.", examples=[None]
    )


class ChatChoice(BaseModel):
    """One answer to the conversation."""

    index: int = Field(description="The choice's number, from 0.", examples=[0])
    message: AssistantMessage = Field(
        description="What the model says.", examples=[{"role": "assistant", "content": "Paris."}]
    )
    logprobs: ChatLogprobs | None = Field(
        description="The tokens' log-probabilities, where asked for.", examples=[None]
    )
    finish_reason: ChatFinishedBecause = Field(
        description="`stop`: an end token or a stop string; `length`: the token limit; "
        "`tool_calls`: a stop after calls that the model decided on.",
        examples=["stop"],
    )
    stop_reason: StopReason = STOP_REASON


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str = Field(description="This answer's id.", examples=["chatcmpl-2f1c"])
    object: Literal["chat.completion"] = Field(
        description="Always `chat.completion`.", examples=["chat.completion"]
    )
    created: int = Field(description="Unix time in seconds.", examples=[1764000000])
    model: str = Field(description="The model as it was asked for.", examples=["support-intent"])
    system_fingerprint: str = Field(
        description="What answered: the adapter and its revision, or the base model.",
        examples=["support-intent@3"],
    )
    choices: list[ChatChoice] = Field(
        description="The answers.",
        examples=[
            [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Paris."},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ]
        ],
    )
    usage: Usage | None = Field(None, description="Tokens taken.", examples=[USAGE_EXAMPLE])


class Delta(TypedDict, total=False):
    """What a chunk adds to a message."""

    role: Literal["assistant"]
    """Set in a choice's first chunk."""
    content: str
    tool_calls: list[dict[str, Any]]
    """Parts of calls, each with the call's number in the message: the first with its id and name,
    all with the next part of its arguments."""


class ChunkChoice(TypedDict, total=False):
    """What a chunk adds to one choice."""

    index: int
    delta: Delta
    logprobs: dict[str, Any] | None
    finish_reason: ChatFinishedBecause | None
    """Set in a choice's last chunk."""
    stop_reason: StopReason
