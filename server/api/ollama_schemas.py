"""The bodies and answers of `POST /api/chat` and `POST /api/generate`, in Ollama's shape."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from infuse.server.api.chat_schemas import MAX_CALLS, MAX_MESSAGES, ChatBody, ChatTokenLogprob
from infuse.server.api.foreign_fields import REFUSED, Refusal, unserved
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.schemas import INT64, MAX_LOGPROBS, StopStrings
from infuse.server.api.tool_schemas import Tools

HARMLESS_IN_OLLAMA = frozenset(
    {
        # How Ollama loads a model, and for how long. Here it is loaded, with a window of its own.
        "f16_kv",
        "keep_alive",
        "logits_all",
        "low_vram",
        "main_gpu",
        "num_batch",
        "num_ctx",
        "num_gpu",
        "num_keep",
        "num_thread",
        "numa",
        "use_mlock",
        "use_mmap",
        # Of mirostat, which is refused.
        "mirostat_eta",
        "mirostat_tau",
    }
)
_TEXT_ONLY = Refusal("leave it out; only text is read and written")
_SAMPLING = "leave it out; temperature, top_k, top_p, min_p and the penalties are served"
_PROMPT = "write the whole prompt yourself, and send it to /v1/completions"
REFUSED_IN_OLLAMA: Mapping[str, Refusal] = {
    "context": Refusal("send the conversation to /api/chat"),
    "embedding_only": _TEXT_ONLY,
    "height": _TEXT_ONLY,
    "images": _TEXT_ONLY,
    "mirostat": Refusal(_SAMPLING),
    "penalize_newline": Refusal(_SAMPLING, (None, True)),
    "raw": Refusal(_PROMPT),
    "repeat_last_n": Refusal(
        "leave it out; repeat_penalty counts the whole prompt and answer", (None, -1)
    ),
    "steps": _TEXT_ONLY,
    "template": Refusal(_PROMPT),
    "tfs_z": Refusal(_SAMPLING, (None, 1)),
    "typical_p": Refusal(_SAMPLING, (None, 0, 1)),
    "vocab_only": _TEXT_ONLY,
    "width": _TEXT_ONLY,
}


_OF_CHAT = Refusal("ask /v1/chat/completions, which knows it, or say it in 'options'")
REFUSED_IN_BODY: Mapping[str, Refusal] = {
    **dict.fromkeys(ChatBody.model_fields.keys() - {"user"}, _OF_CHAT),
    **REFUSED,
    **REFUSED_IN_OLLAMA,
}
"""Also the fields of other servers."""


class _Part(BaseModel):
    """A part of a body. Fields of Ollama's that are not served are refused where they ask for
    something."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _asks_for_what_is_served(self) -> Self:
        for name, refusal in unserved(self.model_extra or {}, REFUSED_IN_BODY):
            raise ValueError(f"{name} is not served here: {refusal.mend}")
        return self


class OllamaOptions(_Part):
    """How the answer is sampled."""

    num_predict: int | None = Field(
        None,
        ge=-2,
        description="At most this many tokens are generated; below 0, and by default, as many as "
        "the window holds.",
        examples=[64],
    )
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 is greedy; default: the model's, or 1.", examples=[0.7]
    )
    top_k: int | None = Field(
        None, ge=-1, description="As in chat completions; 0 or -1 is off.", examples=[40]
    )
    top_p: float | None = Field(
        None, ge=0, le=1, description="As in chat completions.", examples=[0.95]
    )
    min_p: float | None = Field(
        None, ge=0, le=1, description="As in chat completions.", examples=[0.05]
    )
    seed: int | None = Field(
        None, ge=-INT64, lt=INT64, description="Makes sampling repeatable.", examples=[7]
    )
    stop: StopStrings | None = Field(
        None, description="Strings that end the text; not part of it.", examples=[["\n\n"]]
    )
    repeat_penalty: float | None = Field(
        None,
        ge=0.01,
        le=10,
        description="`repetition_penalty` of chat completions: the whole prompt and answer count.",
        examples=[1.1],
    )
    presence_penalty: float | None = Field(
        None, ge=-2, le=2, description="As in chat completions.", examples=[0.0]
    )
    frequency_penalty: float | None = Field(
        None, ge=-2, le=2, description="As in chat completions.", examples=[0.0]
    )


class OllamaFunction(_Part):
    """What is called, and with what."""

    name: str = Field(min_length=1, description="The function's name.", examples=["get_weather"])
    arguments: dict[str, Any] = Field(description="Its arguments.", examples=[{"city": "Paris"}])


class OllamaCall(_Part):
    """A call of a tool."""

    id: str | None = Field(None, description="Names the call.", examples=["a81bc3f02"])
    function: OllamaFunction = Field(
        description="The call.", examples=[{"name": "get_weather", "arguments": {"city": "Paris"}}]
    )


class OllamaMessage(_Part):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant", "tool"] = Field(
        description="Who speaks.", examples=["user"]
    )
    content: str | None = Field(
        None, description="The text; none where there are calls only.", examples=["Is it warm?"]
    )
    thinking: str | None = Field(
        None,
        description="What an assistant's message thought, for templates that show it.",
        examples=[None],
    )
    tool_calls: list[OllamaCall] | None = Field(
        None,
        max_length=MAX_CALLS,
        description="What an assistant's message called.",
        examples=[None],
    )
    tool_name: str | None = Field(
        None, description="Which function a tool's message comes from.", examples=["get_weather"]
    )
    tool_call_id: str | None = Field(
        None,
        description="Which call a tool's message answers; by default the first one of its "
        "`tool_name` that has no answer.",
        examples=["a81bc3f02"],
    )


class OllamaBody(ModelBody):
    """What both endpoints take. Fields that are not listed are ignored, or refused where Ollama
    would answer differently for them."""

    stream: bool | None = Field(
        None,
        description="Send the answer as lines of JSON while it is generated (default true).",
        examples=[False],
    )
    options: OllamaOptions | None = Field(
        None, description="How the answer is sampled.", examples=[{"temperature": 0.7}]
    )
    format: Literal["", "json"] | dict[str, Any] | None = Field(
        None,
        description="Hold the answer to JSON, or to a JSON schema.",
        examples=[{"type": "object", "properties": {"city": {"type": "string"}}}],
    )
    think: bool | str | None = Field(
        None,
        description="False sets `enable_thinking` to false for templates that know it. Others are "
        "refused: thoughts are not told from answers here.",
        examples=[False],
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

    @field_validator("think")
    @classmethod
    def _does_not_think(cls, think: bool | str | None) -> bool | None:
        if think:
            raise ValueError("is not served here: leave it out; thoughts come within the answer")
        return None if think is None else False


class OllamaChatBody(OllamaBody):
    """Answer a conversation, as Ollama does."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] | None = Field(
        None,
        max_length=MAX_MESSAGES,
        description="The conversation so far. None: the answer says that the model is loaded.",
        examples=[[{"role": "user", "content": "What is the capital of France?"}]],
    )
    tools: Tools | None = Field(
        None,
        description="Functions that the model may call, if its chat template has a place for them.",
        examples=[[{"type": "function", "function": {"name": "get_weather"}}]],
    )


class OllamaGenerateBody(OllamaBody):
    """Answer a text, as Ollama does."""

    prompt: str | None = Field(
        None,
        description="What the user says. Empty: the answer says that the model is loaded.",
        examples=["What is the capital of France?"],
    )
    system: str | None = Field(
        None, description="What the conversation begins with.", examples=["Answer briefly."]
    )


class _Answer(BaseModel):
    """An answer, or a chunk of one. The fields after `done` are the last chunk's."""

    model: str = Field(description="The model as it was asked for.", examples=["support-intent"])
    created_at: str = Field(description="When it was made.", examples=["2026-11-30T12:00:00Z"])
    done: bool = Field(description="Whether this is the end.", examples=[True])
    done_reason: Literal["stop", "length", "load"] | None = Field(
        None,
        description="`stop`: an end token or a stop string; `length`: the token limit; `load`: "
        "there was nothing to answer.",
        examples=["stop"],
    )
    logprobs: list[ChatTokenLogprob] | None = Field(
        None, description="One entry per token, where asked for.", examples=[None]
    )
    total_duration: int | None = Field(
        None, description="Nanoseconds that all took.", examples=[210_000_000]
    )
    load_duration: int | None = Field(
        None, description="Nanoseconds in the queue.", examples=[1_000_000]
    )
    prompt_eval_count: int | None = Field(None, description="Tokens of the prompt.", examples=[12])
    prompt_eval_duration: int | None = Field(
        None, description="Nanoseconds up to the first token.", examples=[9_000_000]
    )
    eval_count: int | None = Field(None, description="Generated tokens.", examples=[30])
    eval_duration: int | None = Field(
        None, description="Nanoseconds after the first token.", examples=[200_000_000]
    )


class OllamaAnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = Field(description="Always `assistant`.", examples=["assistant"])
    content: str = Field(description="The generated text.", examples=["Paris."])
    tool_calls: list[OllamaCall] | None = Field(
        None, description="What the model calls.", examples=[None]
    )


class OllamaChatAnswer(_Answer):
    """A whole answer to a conversation."""

    message: OllamaAnswerMessage = Field(
        description="What the model says.", examples=[{"role": "assistant", "content": "Paris."}]
    )


class OllamaGenerateAnswer(_Answer):
    """A whole answer to a text."""

    response: str = Field(description="The generated text.", examples=["Paris."])
