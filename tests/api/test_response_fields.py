"""Every field of OpenAI's Responses API is served, refused with the mend, or known to be
harmless."""

import json
from typing import Any, get_type_hints

import httpx
import pytest
from openai.types.responses import (
    EasyInputMessageParam,
    FunctionToolParam,
    ResponseFunctionToolCallParam,
    ResponseOutputMessageParam,
    ResponseReasoningItemParam,
    ResponseTextConfigParam,
)
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from openai.types.responses.response_format_text_json_schema_config_param import (
    ResponseFormatTextJSONSchemaConfigParam,
)
from openai.types.responses.response_input_param import FunctionCallOutput, Message
from openai.types.responses.response_input_text_param import ResponseInputTextParam
from openai.types.responses.tool_choice_function_param import ToolChoiceFunctionParam
from pydantic import BaseModel

from infuse.server.api.foreign_fields import (
    HARMLESS,
    HARMLESS_IN_RESPONSES,
    REFUSED,
    REFUSED_OF_RESPONSES,
)
from infuse.server.api.response_schemas import (
    CallOutput,
    FunctionChoice,
    FunctionTool,
    InputMessage,
    InputText,
    PastCall,
    PastReasoning,
    ResponseBody,
    TextConfig,
    TextFormat,
)
from tests.api.test_bad_generation_input import refused
from tests.api.test_foreign_fields import VLLM
from tests.api.test_responses import LOGPROBS, RESPONSES, WEATHER

BODY: dict[str, Any] = {"model": "tiny", "input": "Hi", "max_output_tokens": 2, "temperature": 0}
ALL_REFUSED = {**REFUSED, **REFUSED_OF_RESPONSES}
NESTED: list[tuple[Any, type[BaseModel], set[str]]] = [
    (EasyInputMessageParam, InputMessage, {"phase"}),
    (Message, InputMessage, {"status"}),
    (ResponseOutputMessageParam, InputMessage, {"id", "phase", "status"}),
    (ResponseInputTextParam, InputText, {"prompt_cache_breakpoint"}),
    (
        ResponseFunctionToolCallParam,
        PastCall,
        {"id", "status", "caller", "namespace", "async"},
    ),
    (FunctionCallOutput, CallOutput, {"id", "status", "caller", "name", "namespace"}),
    (ResponseReasoningItemParam, PastReasoning, {"id", "status", "summary", "encrypted_content"}),
    (ResponseTextConfigParam, TextConfig, set()),
    (ResponseFormatTextJSONSchemaConfigParam, TextFormat, {"description"}),
    (
        FunctionToolParam,
        FunctionTool,
        {"allowed_callers", "async", "defer_loading", "output_schema"},
    ),
    (ToolChoiceFunctionParam, FunctionChoice, set()),
]
"""OpenAI's kind, ours, and the fields that are harmless: they name an item, say how far it was, or
are of OpenAI's own tools, which are refused."""


def names_of(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def ask(client: httpx.Client, **fields: Any) -> httpx.Response:
    return client.post(RESPONSES, json=BODY | fields)


def test_no_field_of_a_client_is_ignored_unknowingly() -> None:
    known = names_of(ResponseBody) | ALL_REFUSED.keys() | HARMLESS | HARMLESS_IN_RESPONSES

    assert get_type_hints(ResponseCreateParamsBase).keys() - known == set()
    assert set(VLLM[RESPONSES]) - known == set()


def test_no_field_stands_in_two_lists() -> None:
    assert names_of(ResponseBody) & ALL_REFUSED.keys() == set()
    assert names_of(ResponseBody) & HARMLESS_IN_RESPONSES == set()
    assert HARMLESS_IN_RESPONSES & (HARMLESS | ALL_REFUSED.keys()) == set()


@pytest.mark.parametrize(("theirs", "ours", "harmless"), NESTED)
def test_no_field_within_a_field_is_ignored_unknowingly(
    theirs: Any, ours: type[BaseModel], harmless: set[str]
) -> None:
    assert get_type_hints(theirs).keys() - names_of(ours) == harmless


def test_what_a_refused_field_asks_for_is_refused_with_the_mend(client: httpx.Client) -> None:
    for name, refusal in ALL_REFUSED.items():
        error = refused(ask(client, **{name: "x"}))
        assert (error["param"], error["code"]) == (name, "not_served")
        assert refusal.mend in error["message"]


def test_values_that_ask_for_nothing_and_harmless_fields_change_nothing(
    client: httpx.Client,
) -> None:
    plain = ask(client).json()["output"][0]["content"]
    most = max(len(refusal.passes) for refusal in ALL_REFUSED.values())
    nothing = [
        {
            name: refusal.passes[-1 - i % len(refusal.passes)]
            for name, refusal in ALL_REFUSED.items()
        }
        for i in range(most)
    ]
    unread = (HARMLESS | HARMLESS_IN_RESPONSES) - names_of(ResponseBody) - ALL_REFUSED.keys()
    others = [
        dict.fromkeys(unread, "x"),
        {"unknown": {}},
        {"include": ["reasoning.encrypted_content"]},
    ]

    for fields in (*nothing, *others):
        answer = ask(client, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["output"][0]["content"] == plain


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "whole conversation as"),
        ({"conversation": {"id": "conv_1"}}, "conversation", "nothing is stored"),
        ({"store": True}, "store", "nothing is stored"),
        ({"background": True}, "background", "'stream'"),
        ({"truncation": "auto"}, "truncation", "truncate_prompt_tokens"),
        ({"reasoning": {"effort": "low"}}, "reasoning", "chat_template_kwargs"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "'instructions'"),
        ({"max_tokens": 3}, "max_tokens", "'max_output_tokens'"),
        ({"lora_path": "x"}, "lora_path", "as 'model'"),
        ({"top_logprobs": 1}, "top_logprobs", "include"),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"max_output_tokens": 10**6}, "max_output_tokens", "max_output_tokens is 1000000"),
        ({"input": "x" * 1000, "max_output_tokens": 1}, "prompt", "shorten"),
        ({"input": []}, "input", "at least 1"),
        ({"input": None}, "input", "list"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.message.role", "'user'"),
        ({"input": [{"role": "user"}]}, "input.0.message.content", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.message.content",
            'only text parts are supported: {"type": "input_text"',
        ),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input.0", "by reference"),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input.0", "function_call_output"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "[]"}]},
            "input.0.function_call.arguments",
            "JSON object",
        ),
        (
            {"input": [{"type": "function_call_output", "output": "x"}]},
            "input.0.function_call_output.call_id",
            "required",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0", "functions that your program runs"),
        ({"tools": [{"type": "mcp"}]}, "tools.0", "'mcp' is not served here"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "second function"),
        ({"tools": [WEATHER]}, "tools", "no place for tools"),
        ({"tool_choice": "required"}, "tool_choice", "no tools"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "leave the others out"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "go"}},
            "tool_choice",
            "'go', but the tools are ['get_weather']",
        ),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "medium"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format", "schema"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "json_schema"),
        (
            {"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}},
            "text.format.schema",
            "not",
        ),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "exclude",
        ),
        ({"metadata": {"a": 1}}, "metadata.a", "string"),
        ({"metadata": {"a": "\ud800"}}, None, "cannot repeat"),
        ({"model": "nobody"}, "model", "nobody"),
    ],
)
def test_what_is_not_served_is_refused_with_the_place(
    client: httpx.Client, fields: dict[str, Any], param: str | None, said: str
) -> None:
    content = json.dumps(BODY | fields)
    headers = {"Content-Type": "application/json"}
    status = 404 if fields.get("model") == "nobody" else 400

    error = refused(client.post(RESPONSES, content=content, headers=headers), status)

    assert error["param"] == param
    assert said in error["message"]


def test_included_log_probabilities_need_no_number(client: httpx.Client) -> None:
    [part] = ask(client, include=LOGPROBS).json()["output"][0]["content"]

    assert [each["top_logprobs"] for each in part["logprobs"]] == [[], []]
