"""Turns texts and conversations into token ids that fit the model. Blocking: call on a thread."""

import inspect
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from infuse.adapters.errors import TemplateRefused
from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.chat_schemas import ChatBody
from infuse.server.api.schemas import GenerationBody
from infuse.server.api.texts import check_text
from infuse.server.api.tool_schemas import Tool
from infuse.server.engine import ServedModel
from infuse.server.errors import ApiError

MAX_CHARACTERS_PER_TOKEN = 128
"""No text averages more characters a token: a longer one is refused without tokenising it."""

_RESERVED_TEMPLATE_KWARGS = frozenset(
    inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
) | {"messages"}


def encode_prompts(
    model: ServedModel,
    vocabulary: Vocabulary,
    prompts: Sequence[str | list[int]],
    add_special_tokens: bool = True,
) -> list[tuple[int, ...]]:
    """The token ids of each prompt. Raises ApiError 400 where one is empty, too long or unknown."""
    several = len(prompts) > 1
    encoded: list[tuple[int, ...]] = []
    for index, prompt in enumerate(prompts):
        where = f"prompt[{index}]" if several else "prompt"
        if isinstance(prompt, str):
            encoded.append(
                _encode_text(
                    model, vocabulary, prompt, where, add_special_tokens=add_special_tokens
                )
            )
        else:
            encoded.append(_check_ids(vocabulary, prompt, where))
    return encoded


def encode_conversation(
    model: ServedModel, vocabulary: Vocabulary, body: ChatBody
) -> tuple[str, tuple[int, ...]]:
    """The conversation as the model's chat template writes it, as text and as token ids.

    Raises ApiError 400, and what `Vocabulary.render` raises.
    """
    if not vocabulary.has_template:
        raise ApiError(
            400,
            "This model has no chat template; use /v1/completions and write the prompt yourself.",
            param=body.conversation_field,
        )
    text = _render(vocabulary, body, body.offered_tools)
    if body.offered_tools and text == _render(vocabulary, body, []):
        raise ApiError(
            400,
            "This model's chat template has no place for tools; leave them out, or describe them "
            "in a message of your own.",
            param="tools",
        )
    adds = bool(body.add_special_tokens)
    where = body.conversation_field
    return text, _encode_text(model, vocabulary, text, where, add_special_tokens=adds)


def encode_prediction(
    model: ServedModel, vocabulary: Vocabulary, body: ChatBody
) -> tuple[int, ...]:
    """The tokens that the answer is expected to have. Raises ApiError 400."""
    text = "" if body.prediction is None else body.prediction.content
    if not text:
        return ()
    where = "prediction"
    return _encode_text(model, vocabulary, text, where, add_special_tokens=False)


def _render(vocabulary: Vocabulary, body: ChatBody, tools: Sequence[Tool]) -> str:
    variables: dict[str, Any] = body.chat_template_kwargs or {}
    reserved = sorted(_RESERVED_TEMPLATE_KWARGS & variables.keys())
    if reserved:
        raise ApiError(
            400,
            f"chat_template_kwargs cannot set {', '.join(reserved)}; only the template's own "
            "variables.",
            param="chat_template_kwargs",
        )
    goes_on = bool(body.continue_final_message)
    opens = not goes_on if body.add_generation_prompt is None else body.add_generation_prompt
    rendered = vocabulary.render(
        [message.for_template() for message in body.messages],
        [tool.for_template() for tool in tools] or None,
        variables,
        add_generation_prompt=opens,
        continue_final_message=goes_on,
    )
    try:
        return check_text(rendered, "the rendered conversation")
    except ValueError as error:
        raise TemplateRefused(str(error)) from error


def encode_choice(
    model: ServedModel,
    vocabulary: Vocabulary,
    prompt: str | list[int],
    choice: str | list[int],
    where: str,
) -> tuple[tuple[int, ...], int]:
    """Prompt and choice as token ids, and how many of them are the choice's.

    Texts are encoded together, and blanks at the prompt's end count to the choice, as in
    lm-evaluation-harness (`TemplateLM._encode_pair`): so tokens fall as in running text. Raises
    ApiError 400.
    """
    if isinstance(prompt, str) and isinstance(choice, str):
        whole = _encode_text(model, vocabulary, prompt + choice, where, add_special_tokens=True)
        before = vocabulary.tokenizer.encode(prompt.rstrip())
        if not before:
            raise _empty("prompt")
        scored = len(whole) - len(before)
    elif isinstance(prompt, list) and isinstance(choice, list):
        whole = _check_ids(vocabulary, [*prompt, *choice], where)
        scored = len(choice)
        if not prompt:
            raise _empty("prompt")
    else:
        raise ApiError(400, f"{where}: prompt and choice are both text, or both token ids.")
    if scored < 1 or not choice:
        raise _empty(where)
    if len(whole) > model.max_model_len:
        raise _too_long(model, f"{where} and its prompt have {len(whole)} tokens.", where)
    return whole, scored


def encode_pair(
    model: ServedModel,
    vocabulary: Vocabulary,
    prompt: str | list[int],
    choice: str | list[int],
    where: str,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and choice for an encoder and its decoder: texts of their own, with the end tokens
    that the tokenizer adds, as in T-Few's code. Raises ApiError 400."""
    assert model.decoder_start is not None
    if type(prompt) is not type(choice):
        raise ApiError(400, f"{where}: prompt and choice are both text, or both token ids.")
    source, target = (
        _encode_text(model, vocabulary, text, name, add_special_tokens=True)
        if isinstance(text, str)
        else _check_ids(vocabulary, text, name)
        for text, name in ((prompt, "prompt"), (choice, where))
    )
    for ids, name in ((source, "prompt"), ((*model.decoder_start, *target), where)):
        if len(ids) > model.max_model_len:
            raise _too_long(model, f"{name} has {len(ids)} tokens.", name)
    return source, target


def _encode_text(
    model: ServedModel, vocabulary: Vocabulary, text: str, where: str, *, add_special_tokens: bool
) -> tuple[int, ...]:
    if len(text) > model.max_model_len * MAX_CHARACTERS_PER_TOKEN:
        raise _too_long(model, f"{where} has {len(text)} characters, far more than fit.", where)
    try:
        check_text(text, where)
    except ValueError as error:
        raise ApiError(400, f"{error}.", param=where.partition("[")[0]) from None
    ids = vocabulary.tokenizer.encode(text, add_special_tokens=add_special_tokens) if text else []
    if not ids:
        raise _empty(where)
    return tuple(ids)


def _check_ids(vocabulary: Vocabulary, ids: Sequence[int], where: str) -> tuple[int, ...]:
    if not ids:
        raise _empty(where)
    for index, token in enumerate(ids):
        if not 0 <= token < vocabulary.size:
            raise ApiError(
                400,
                f"{where}[{index}] is {shown(token)}; the token ids of this model go from 0 to "
                f"{vocabulary.size - 1}.",
                param="prompt",
            )
    return tuple(ids)


def fit_to_window(
    model: ServedModel, prompt: Sequence[int], field: str, limit: int | None, default: int | None
) -> int:
    """How many tokens may be generated after this prompt: `limit`, or the default cut to fit.

    `field` names the limit in errors. Without a default, the whole rest of the window. Raises
    ApiError 400 (`context_length_exceeded`) where prompt and limit do not fit together.
    """
    room = model.room_after(len(prompt))
    if limit is None:
        if room < 1:
            raise _too_long(
                model, f"The prompt has {len(prompt)} tokens, so nothing can follow it.", "prompt"
            )
        return room if default is None else min(default, room)
    if limit > room:
        mend = f" or ask for at most {room} tokens" if room > 0 else ""
        raise _too_long(
            model,
            f"The prompt has {len(prompt)} tokens and {field} is {shown(limit)}; shorten the "
            f"prompt{mend}.",
            field if room > 0 else "prompt",
        )
    return limit


def truncated(
    model: ServedModel, prompt: tuple[int, ...], body: GenerationBody, room: int
) -> tuple[int, ...]:
    """The prompt, cut to as many tokens as `truncate_prompt_tokens` says; where that is -1, to as
    many as leave `room` for the answer."""
    most = body.truncate_prompt_tokens
    if most is None:
        return prompt
    if most == -1:
        most = model.max_model_len - (room if model.decoder_start is None else 0)
    if len(prompt) <= most or most < 1:
        return prompt
    return prompt[:most] if body.truncation_side == "right" else prompt[-most:]


def shown(number: int) -> str:
    """A number for an error message, however long the client made it."""
    return str(number) if abs(number) < 10**18 else "a number of more than 18 digits"


def _empty(where: str) -> ApiError:
    return ApiError(
        400,
        f"{where} is empty; give at least one token (for the bare start of a text, the id of the "
        "model's begin token as a list).",
        param=where.partition("[")[0],
    )


def _too_long(model: ServedModel, problem: str, param: str) -> ApiError:
    return ApiError(
        400,
        f"This model's window is {model.max_model_len} tokens. {problem}",
        param=param.partition("[")[0],
        code="context_length_exceeded",
    )
