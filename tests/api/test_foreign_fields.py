"""Every field that OpenAI's and vLLM's clients send is served, refused, or known to be harmless."""

from typing import Any, get_type_hints

import httpx
import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionStreamOptionsParam,
    ChatCompletionSystemMessageParam,
    ChatCompletionToolMessageParam,
    ChatCompletionUserMessageParam,
)
from openai.types.chat import completion_create_params as chat_params

from infuse.server.api.chat_schemas import ChatBody, Message
from infuse.server.api.completion_schemas import CompletionBody
from infuse.server.api.foreign_fields import HARMLESS, REFUSED
from infuse.server.api.schemas import StreamOptions
from tests.api.test_bad_generation_input import refused
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS

BOTH = [COMPLETIONS, CHAT]
BODIES = {COMPLETIONS: CompletionBody, CHAT: ChatBody}
OPENAI = {
    COMPLETIONS: completion_params.CompletionCreateParamsBase,
    CHAT: chat_params.CompletionCreateParamsBase,
}
VLLM_OF_BOTH = """
    model frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop stream
    stream_options temperature top_p user use_beam_search top_k min_p repetition_penalty
    watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    allowed_token_ids prompt_logprobs logprob_token_ids bad_words add_special_tokens
    response_format structured_outputs priority request_id session_id return_tokens_as_token_ids
    return_token_ids routed_experts_prompt_start return_token_offsets return_mm_kwargs cache_salt
    kv_transfer_params ec_transfer_params vllm_xargs repetition_detection thinking_token_budget
    stream_interval guided_json guided_regex guided_choice guided_grammar guided_json_object
    guided_decoding_backend guided_whitespace_pattern logits_processors best_of early_stopping
"""
"""Fields of its request classes in November 2026, and of the years before."""
VLLM = {
    COMPLETIONS: "prompt echo suffix prompt_embeds",
    CHAT: """
        messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort
        include_reasoning parallel_tool_calls add_generation_prompt continue_final_message
        documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs
        return_prompt_text
    """,
}


@pytest.mark.parametrize("path", BOTH)
def test_no_field_of_a_client_is_ignored_unknowingly(path: str) -> None:
    known = BODIES[path].model_fields.keys() | REFUSED.keys() | HARMLESS

    assert get_type_hints(OPENAI[path]).keys() - known == set()
    assert set((VLLM_OF_BOTH + VLLM[path]).split()) - known - {"best_of"} == set()


def test_no_field_stands_in_two_lists() -> None:
    served = CompletionBody.model_fields.keys() | ChatBody.model_fields.keys()

    assert HARMLESS & REFUSED.keys() == set()
    assert served & HARMLESS == set()
    assert served & REFUSED.keys() == set()


def test_no_field_of_a_message_is_ignored_unknowingly() -> None:
    kinds: list[Any] = [
        ChatCompletionAssistantMessageParam,
        ChatCompletionSystemMessageParam,
        ChatCompletionToolMessageParam,
        ChatCompletionUserMessageParam,
    ]

    for kind in kinds:
        assert get_type_hints(kind).keys() - Message.model_fields.keys() == set()
    options = get_type_hints(ChatCompletionStreamOptionsParam).keys()
    assert options - StreamOptions.model_fields.keys() == {"include_obfuscation"}


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
