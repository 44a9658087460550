"""Every field that OpenAI's and vLLM's clients send is served, refused, or known to be harmless."""

import json
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionFunctionToolParam,
    ChatCompletionMessageFunctionToolCallParam,
    ChatCompletionNamedToolChoiceParam,
    ChatCompletionPredictionContentParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params
from openai.types.shared_params import FunctionDefinition as FunctionDefinitionParam
from openai.types.shared_params import ResponseFormatJSONSchema
from openai.types.shared_params.response_format_json_schema import JSONSchema
from pydantic import BaseModel

from infuse.server.api.chat_schemas import ChatBody, Message, Prediction, TextPart
from infuse.server.api.completion_schemas import CompletionBody
from infuse.server.api.constraint_schemas import JsonSchema, ResponseFormat
from infuse.server.api.foreign_fields import HARMLESS, REFUSED
from infuse.server.api.schemas import StreamOptions
from infuse.server.api.tokenize import TokenizeBody
from infuse.server.api.tool_schemas import FunctionDefinition, NamedToolChoice, PastToolCall, Tool
from tests.api.test_bad_generation_input import refused
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS
from tests.vllm.request_fields import LIST

BOTH = [COMPLETIONS, CHAT]
BODIES = {COMPLETIONS: CompletionBody, CHAT: ChatBody}
OPENAI = {
    COMPLETIONS: completion_params.CompletionCreateParamsBase,
    CHAT: chat_params.CompletionCreateParamsBase,
}
VLLM: dict[str, list[str]] = json.loads(LIST.read_text())
"""Path -> the fields that vLLM reads there."""
OLDER = """
    guided_json guided_regex guided_choice guided_grammar guided_json_object best_of early_stopping
    guided_decoding_backend guided_whitespace_pattern logits_processors
"""
"""Fields of vLLM's in the years before."""
NESTED: dict[Any, type[BaseModel]] = {
    ChatCompletionFunctionToolParam: Tool,
    FunctionDefinitionParam: FunctionDefinition,
    ChatCompletionNamedToolChoiceParam: NamedToolChoice,
    ChatCompletionMessageFunctionToolCallParam: PastToolCall,
    ChatCompletionContentPartTextParam: TextPart,
    ChatCompletionPredictionContentParam: Prediction,
    ResponseFormatJSONSchema: ResponseFormat,
    JSONSchema: JsonSchema,
    ChatCompletionStreamOptionsParam: StreamOptions,
}
"""OpenAI's types within a body, and ours."""
NESTED_HARMLESS = {"prompt_cache_breakpoint", "description", "include_obfuscation"}
"""A hint where to cache, a text about a schema for people, and bytes that fill up events."""


@pytest.mark.parametrize("path", BOTH)
def test_no_field_of_a_client_is_ignored_unknowingly(path: str) -> None:
    known = BODIES[path].model_fields.keys() | REFUSED.keys() | HARMLESS

    assert get_type_hints(OPENAI[path]).keys() - known == set()
    assert {*VLLM[path], *OLDER.split()} - known - {"best_of"} == set()


def test_no_field_of_a_text_to_tokenise_is_ignored_unknowingly() -> None:
    known = TokenizeBody.model_fields.keys() | REFUSED.keys() | HARMLESS

    assert set(VLLM["/tokenize"]) - known == set()


@pytest.mark.parametrize("theirs", NESTED, ids=lambda kind: kind.__name__)
def test_no_field_within_a_body_is_ignored_unknowingly(theirs: Any) -> None:
    ours = NESTED[theirs].model_fields
    known = ours.keys() | {field.alias for field in ours.values()} | NESTED_HARMLESS

    assert get_type_hints(theirs).keys() - known == set()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "custom", "custom": {"name": "x"}}]),
        ("tool_choice", {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}),
        ("tool_choice", {"type": "custom", "custom": {"name": "x"}}),
        ("response_format", {"type": "structural_tag", "format": {}}),
        ("messages", [{"role": "function", "name": "x", "content": "y"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
    ],
)
def test_a_kind_of_value_that_is_not_served_is_refused(
    client: httpx.Client, field: str, value: object
) -> None:
    error = refused(client.post(CHAT, json={"model": "tiny", **PROMPTS[CHAT], field: value}))

    assert str(error["param"]).startswith(field)


def test_no_field_stands_in_two_lists() -> None:
    served = CompletionBody.model_fields.keys() | ChatBody.model_fields.keys()

    assert HARMLESS & REFUSED.keys() == set()
    assert served & HARMLESS == set()
    # vLLM's chat echoes the last message; what it has of completions is another thing.
    assert served & REFUSED.keys() == {"echo"}


def test_no_field_of_a_message_is_ignored_unknowingly() -> None:
    kinds: list[Any] = [
        ChatCompletionAssistantMessageParam,
        ChatCompletionSystemMessageParam,
        ChatCompletionToolMessageParam,
        ChatCompletionUserMessageParam,
    ]

    for kind in kinds:
        assert get_type_hints(kind).keys() - Message.model_fields.keys() == set()


@pytest.mark.parametrize("path", BOTH)
def test_what_a_refused_field_asks_for_is_refused_with_the_mend(
    client: httpx.Client, path: str
) -> None:
    for name, refusal in REFUSED.items():
        if name in BODIES[path].model_fields:
            continue
        error = refused(client.post(path, json={"model": "tiny", **PROMPTS[path], name: "x"}))
        assert (error["param"], error["code"]) == (name, "not_served")
        assert refusal.mend in error["message"]


@pytest.mark.parametrize("path", BOTH)
def test_values_that_ask_for_nothing_and_harmless_fields_change_nothing(
    client: httpx.Client, path: str
) -> None:
    body = {"model": "tiny", **PROMPTS[path], "max_tokens": 4, "temperature": 0}
    fields = {n: v for n in REFUSED for v in REFUSED[n].passes if not isinstance(v, float)}
    plain = client.post(path, json=body).json()

    for more in (fields, dict.fromkeys(REFUSED), dict.fromkeys(HARMLESS, "x"), {"unknown": {}}):
        more = {k: v for k, v in more.items() if k not in BODIES[path].model_fields}
        answer = client.post(path, json=body | more)
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == plain["choices"]


@pytest.mark.parametrize(
    ("field", "value", "ok"),
    [
        ("prompt_logprobs", 0, False),
        ("web_search_options", {}, False),
        ("include_reasoning", False, False),
        ("include_reasoning", True, True),
        ("thinking_token_budget", 0, False),
        ("thinking_token_budget", -1, True),
        ("reasoning_effort", "none", False),
        ("verbosity", "medium", True),
        ("verbosity", "low", False),
        ("modalities", ["text"], True),
        ("modalities", ["text", "audio"], False),
        ("length_penalty", 1.0, True),
        ("length_penalty", 0.5, False),
        ("repeat_penalty", True, False),
        ("function_call", "none", True),
        ("lora", [{"id": 0, "scale": 0.5}], False),
        ("lora_id", 0, False),
        ("do_sample", False, False),
        ("max_new_tokens", 0, False),
    ],
)
def test_nothing_differs_by_field(
    client: httpx.Client, field: str, value: object, ok: bool
) -> None:
    body = {"model": "tiny", **PROMPTS[CHAT], "max_tokens": 1, field: value}
    response = client.post(CHAT, json=body)

    assert response.status_code == 200 if ok else refused(response)["param"] == field


@pytest.mark.parametrize("model", ["tiny", "default"])
@pytest.mark.parametrize("field", ["lora_path", "adapter_id", "lora", "lora_name", "loras"])
def test_another_servers_way_to_name_an_adapter_is_told_ours(
    client: httpx.Client, model: str, field: str
) -> None:
    body = {"model": model, **PROMPTS[COMPLETIONS], field: "default"}
    error = refused(client.post(COMPLETIONS, json=body))

    assert "as 'model'" in error["message"]
    assert "GET /v1/models" in error["message"]


def test_ranking_refuses_them_too(client: httpx.Client) -> None:
    body = {"model": "tiny", "inputs": [{"prompt": "a", "choices": ["b"]}], "adapter_id": "x"}

    assert refused(client.post("/v1/rank", json=body))["param"] == "adapter_id"


@pytest.mark.parametrize("field", ["function_call", "audio"])
def test_what_is_not_read_of_a_message_is_refused(client: httpx.Client, field: str) -> None:
    message = {"role": "assistant", "content": "Hi", field: {"id": "a"}}
    error = refused(client.post(CHAT, json={"model": "tiny", "messages": [message]}))

    assert error["param"] == f"messages.0.{field}"
