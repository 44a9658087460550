"""`/tokenize`, `/detokenize` and `/tokenizer_info`, as vLLM has them: for clients that count
tokens or score texts without a copy of the tokenizer."""

from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.chat_schemas import MAX_MESSAGES, ChatBody, Message
from infuse.server.api.deadlines import DeadlineDep
from infuse.server.api.foreign_fields import refuse_foreign
from infuse.server.api.leasing import leased
from infuse.server.api.model_schemas import ModelBody
from infuse.server.api.preparing import prepared
from infuse.server.api.prompts import encode_conversation, encode_prompts
from infuse.server.api.tool_schemas import Tools
from infuse.server.auth import CallerDep
from infuse.server.errors import ApiError
from infuse.server.openapi import errors
from infuse.server.services import Services, ServicesDep

router = APIRouter(tags=["models"])


class _TokensBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="An adapter's name, `name@revision`, or the base model's name (the default).",
        examples=["support-intent"],
    )


class TokenizeBody(_TokensBody):
    """A text, or a conversation, to turn into token ids."""

    prompt: str | None = Field(
        None, description="A text; or give `messages`.", examples=["The capital of France is"]
    )
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        max_length=MAX_MESSAGES,
        description="A conversation, which the model's chat template renders.",
        examples=[[{"role": "user", "content": "Where is my order?"}]],
    )
    add_special_tokens: bool | None = Field(
        None,
        description="Add the tokenizer's begin and end tokens (default: to a prompt, and not to "
        "what the chat template wrote).",
        examples=[True],
    )
    return_token_strs: bool | None = Field(
        None, description="Name the tokens by their texts too.", examples=[False]
    )
    add_generation_prompt: bool | None = Field(
        None, description="As in /v1/chat/completions.", examples=[True]
    )
    continue_final_message: bool | None = Field(
        None, description="As in /v1/chat/completions.", examples=[False]
    )
    chat_template_kwargs: dict[str, Any] | None = Field(
        None,
        max_length=64,
        description="As in /v1/chat/completions.",
        examples=[{"enable_thinking": False}],
    )
    tools: Tools | None = Field(
        None,
        description="As in /v1/chat/completions.",
        examples=[[{"type": "function", "function": {"name": "get_weather"}}]],
    )

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        if (self.prompt is None) is (self.messages is None):
            raise ValueError("give a prompt or messages, and not both")
        return self

    def conversation(self, model: str) -> ChatBody:
        """The request for a chat that begins with these tokens."""
        given = self.model_dump(exclude={"model", "prompt", "return_token_strs"}, exclude_none=True)
        return ChatBody.model_validate(given | {"model": model})


class TokenizedText(BaseModel):
    count: int = Field(description="How many tokens there are.", examples=[2])
    max_model_len: int = Field(
        description="Tokens that a prompt and its answer have at most.", examples=[8192]
    )
    tokens: list[int] = Field(description="The token ids.", examples=[[504, 2959]])
    token_strs: list[str] | None = Field(
        None, description="The tokens as the tokenizer writes them.", examples=[["The", "Ġcapital"]]
    )


class DetokenizeBody(_TokensBody):
    """Token ids to turn into a text."""

    tokens: list[Annotated[int, Field(ge=0)]] = Field(
        description="The token ids.", examples=[[504, 2959]]
    )


class DetokenizedText(BaseModel):
    prompt: str = Field(description="Their text.", examples=["The capital"])


class TokenizerInfo(BaseModel):
    """The base model's tokenizer, in the words of a `tokenizer_config.json`."""

    tokenizer_class: str = Field(
        description="transformers' class.", examples=["PreTrainedTokenizerFast"]
    )
    model_max_length: int = Field(
        description="Tokens that a prompt and its answer have at most.", examples=[8192]
    )
    bos_token: str | None = Field(description="Begins a text.", examples=["<|im_start|>"])
    eos_token: str | None = Field(description="Ends a text.", examples=["<|im_end|>"])
    unk_token: str | None = Field(description="For what is not known.", examples=["<|unk|>"])
    pad_token: str | None = Field(description="Fills up.", examples=["<|im_end|>"])
    chat_template: str | None = Field(
        description="Renders conversations.", examples=["{{ messages[0].content }}"]
    )


@router.post("/tokenize", summary="Turn a text into tokens", responses=errors(404, 500, 504, 507))
async def tokenize(
    body: TokenizeBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> TokenizedText:
    """The token ids of a text or a conversation, as a request would have them."""
    refuse_foreign(body.model_extra or {})
    model = services.engine.model
    named = ModelBody(model=body.model or services.model_name)

    def prepare() -> TokenizedText:
        with leased(services, named, caller) as (_, vocabulary):
            if body.messages is not None:
                _, ids = encode_conversation(model, vocabulary, body.conversation(named.model))
            else:
                ids = _ids(services, vocabulary, body)
            names = vocabulary.tokenizer.convert_ids_to_tokens(list(ids))
        return TokenizedText(
            count=len(ids),
            max_model_len=model.max_model_len,
            tokens=list(ids),
            token_strs=names if body.return_token_strs else None,
        )

    return await prepared(request, services, caller, deadline, prepare)


def _ids(services: Services, vocabulary: Vocabulary, body: TokenizeBody) -> tuple[int, ...]:
    """Raises ApiError 400."""
    adds = body.add_special_tokens is not False
    if not body.prompt:
        return tuple(vocabulary.tokenizer.encode("", add_special_tokens=adds))
    [ids] = encode_prompts(services.engine.model, vocabulary, [body.prompt], adds)
    return ids


@router.post("/detokenize", summary="Turn tokens into a text", responses=errors(404, 500, 504, 507))
async def detokenize(
    body: DetokenizeBody,
    request: Request,
    services: ServicesDep,
    caller: CallerDep,
    deadline: DeadlineDep,
) -> DetokenizedText:
    """The text of token ids, special tokens included."""
    named = ModelBody(model=body.model or services.model_name)

    def prepare() -> DetokenizedText:
        with leased(services, named, caller) as (_, vocabulary):
            unknown = [token for token in body.tokens if token >= vocabulary.size]
            if unknown:
                raise ApiError(
                    400,
                    f"{str(unknown[0])[:20]} is no token id of this model; they go from 0 to "
                    f"{vocabulary.size - 1}.",
                    param="tokens",
                )
            return DetokenizedText(prompt=str(vocabulary.tokenizer.decode(body.tokens)))

    return await prepared(request, services, caller, deadline, prepare)


@router.get("/tokenizer_info", summary="Describe the tokenizer")
async def tokenizer_info(services: ServicesDep) -> TokenizerInfo:
    """The base model's special tokens and chat template."""
    tokenizer = services.engine.model.tokenizer
    template = tokenizer.chat_template
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        model_max_length=services.engine.model.max_model_len,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        unk_token=tokenizer.unk_token,
        pad_token=tokenizer.pad_token,
        chat_template=template.get("default") if isinstance(template, dict) else template,
    )
