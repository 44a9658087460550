"""Request fields of OpenAI's API and of other servers that are not served here.

A field that would change the answer is refused where it asks for something, so that nobody is
answered with less than was asked for. A field that changes no answer is harmless, and ignored, as
are fields that nobody knows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from infuse.server.errors import ApiError

NOTHING: tuple[object, ...] = (None, False, 0, "", [], {}, "auto")
"""Values by which most fields ask for nothing."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """How a client can mend a refused field, and the field's values that ask for nothing."""

    mend: str
    passes: tuple[object, ...] = NOTHING


HARMLESS = frozenset(
    {
        # OpenAI's: for its own records and its own machines.
        "metadata",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        # vLLM's: names of the request, sizes of chunks, what only its other endpoints or only
        # images read.
        "guided_decoding_backend",
        "media_io_kwargs",
        "mm_processor_kwargs",
        "request_id",
        "return_mm_kwargs",
        "return_token_offsets",
        "session_id",
        "spaces_between_special_tokens",
        "stream_interval",
        # llama.cpp's, SGLang's.
        "cache_prompt",
        "id_slot",
        "rid",
    }
)

_ADAPTER = Refusal(
    "name the adapter as 'model', or several in 'adapters'; GET /v1/models lists their names"
)
_SAMPLING = Refusal("leave it out; temperature, top_p, top_k, min_p and the penalties are served")
_LENGTH = Refusal("say it with 'max_tokens'", (None,))
_STRUCTURE = Refusal("say it with 'structured_outputs'")
_TEMPLATE_KWARGS = Refusal(
    "give the chat template's own variables in 'chat_template_kwargs', as in "
    '{"enable_thinking": false}'
)
_LEAVE_OUT = Refusal("leave it out")
_TEXT_ONLY = Refusal("leave it out; only text is generated")
_PROMPT_TEXT = Refusal("write it into the prompt or a message")
_NOT_REPORTED = Refusal("leave it out; 'logprobs' reports the tokens")

REFUSED: Mapping[str, Refusal] = {
    # Other servers' ways to name an adapter: vLLM, SGLang, LoRAX, TGI, llama.cpp.
    "adapter": _ADAPTER,
    "adapter_id": _ADAPTER,
    "adapter_ids": _ADAPTER,
    "adapter_name": _ADAPTER,
    "adapter_names": _ADAPTER,
    "adapter_parameters": _ADAPTER,
    "adapter_path": _ADAPTER,
    "adapter_source": _ADAPTER,
    "api_token": _ADAPTER,
    "lora": Refusal(_ADAPTER.mend, (None, "", [], {})),
    "lora_adapter": _ADAPTER,
    "lora_id": Refusal(_ADAPTER.mend, (None, "")),
    "lora_name": _ADAPTER,
    "lora_path": _ADAPTER,
    "lora_request": _ADAPTER,
    "loras": _ADAPTER,
    "merged_adapters": _ADAPTER,
    # OpenAI's.
    "audio": _TEXT_ONLY,
    "function_call": Refusal("use 'tools' and 'tool_choice'", (*NOTHING, "none")),
    "functions": Refusal("use 'tools'"),
    "modalities": Refusal(_TEXT_ONLY.mend, (*NOTHING, ["text"])),
    "moderation": _LEAVE_OUT,
    "reasoning_effort": Refusal(_TEMPLATE_KWARGS.mend, (None,)),
    "suffix": Refusal("leave it out, and write the insertion's place into the prompt"),
    "verbosity": Refusal("say in a message how long the answer shall be", (None, "medium")),
    "web_search_options": Refusal("leave it out", (None,)),
    # vLLM's.
    "chat_template": Refusal("write the prompt yourself, for /v1/completions"),
    "documents": _PROMPT_TEXT,
    "early_stopping": _SAMPLING,
    # Where it is no field of the endpoint's own.
    "echo": Refusal("repeat the last message yourself; /v1/completions serves it"),
    "ec_transfer_params": _LEAVE_OUT,
    "guided_json_object": Refusal('use response_format: {"type": "json_object"}'),
    "guided_whitespace_pattern": Refusal("leave it out; JSON has one blank where blanks may be"),
    "include_reasoning": Refusal(_TEMPLATE_KWARGS.mend, (None, True)),
    "kv_transfer_params": _LEAVE_OUT,
    "length_penalty": Refusal(_SAMPLING.mend, (None, 1)),
    "logits_processors": _LEAVE_OUT,
    "logprob_token_ids": Refusal("use 'top_logprobs' or 'logprobs', or /v1/rank to score texts"),
    "mm_payload": _TEXT_ONLY,
    "prompt_embeds": Refusal("send text or token ids"),
    "prompt_logprobs": Refusal(
        "use /v1/completions with echo: true, logprobs and max_tokens: 0, or /v1/rank", (None,)
    ),
    "repetition_detection": _SAMPLING,
    "return_prompt_text": Refusal("leave it out"),
    "return_token_ids": _NOT_REPORTED,
    "return_tokens_as_token_ids": _NOT_REPORTED,
    "routed_experts_prompt_start": _LEAVE_OUT,
    "thinking_token_budget": Refusal(_TEMPLATE_KWARGS.mend, (None, -1)),
    "use_beam_search": _SAMPLING,
    "vllm_xargs": _LEAVE_OUT,
    "watermarking": _LEAVE_OUT,
    # TGI's and LoRAX's.
    "apply_chat_template": Refusal("send messages to /v1/chat/completions"),
    "decoder_input_details": Refusal("use /v1/completions with echo: true and logprobs"),
    "details": _NOT_REPORTED,
    "do_sample": Refusal("say it with 'temperature': 0 is greedy", (None,)),
    "guideline": _PROMPT_TEXT,
    "inputs": Refusal("send 'prompt', or 'messages'"),
    "max_new_tokens": _LENGTH,
    "parameters": Refusal("set each parameter in the body itself"),
    "return_full_text": Refusal("say it with 'echo'"),
    "return_k_alternatives": _NOT_REPORTED,
    "tool_prompt": _PROMPT_TEXT,
    "top_n_tokens": _NOT_REPORTED,
    "truncate": Refusal("say it with 'truncate_prompt_tokens'"),
    "typical_p": Refusal(_SAMPLING.mend, (None, 0, 1)),
    "watermark": _LEAVE_OUT,
    # SGLang's and llama.cpp's.
    "continuous_usage_stats": Refusal("set it in 'stream_options'"),
    "custom_logit_processor": _LEAVE_OUT,
    "dry_multiplier": _SAMPLING,
    "ebnf": _STRUCTURE,
    "grammar": _STRUCTURE,
    "input_ids": Refusal("send token ids as 'prompt'"),
    "json_schema": _STRUCTURE,
    "mirostat": _SAMPLING,
    "n_predict": _LENGTH,
    "n_probs": _NOT_REPORTED,
    "no_stop_trim": Refusal("say it with 'include_stop_str_in_output'"),
    "regex": _STRUCTURE,
    "repeat_penalty": Refusal("say it with 'repetition_penalty'", (None, 1)),
    "return_hidden_states": _LEAVE_OUT,
    "samplers": _SAMPLING,
    "sampling_params": Refusal("set each parameter in the body itself"),
    "session_params": _LEAVE_OUT,
    "stop_regex": Refusal("say it with 'stop'"),
    "top_a": _SAMPLING,
    "xtc_probability": _SAMPLING,
}

_NOT_STORED = Refusal(
    "nothing is stored here; send the whole conversation as 'input'", (None, False, "", {})
)
REFUSED_OF_RESPONSES: Mapping[str, Refusal] = {
    "access_programs": _LEAVE_OUT,
    "background": Refusal("leave it out; with 'stream' the answer comes as it is generated"),
    "background_options": _LEAVE_OUT,
    "context_management": Refusal("leave early items out yourself"),
    "conversation": _NOT_STORED,
    "enable_response_messages": _LEAVE_OUT,
    "logprobs": Refusal("say it with 'include': [\"message.output_text.logprobs\"]"),
    "max_completion_tokens": Refusal("say it with 'max_output_tokens'", (None,)),
    "max_tokens": Refusal("say it with 'max_output_tokens'", (None,)),
    "messages": Refusal("send them as 'input'"),
    "mm_payload": _TEXT_ONLY,
    "n": Refusal("send several requests", (None, 1)),
    "previous_input_messages": Refusal("send them as 'input'"),
    "previous_response_id": _NOT_STORED,
    "prompt": Refusal("no prompts are stored here; write it into 'instructions' and 'input'"),
    "reasoning": Refusal(_TEMPLATE_KWARGS.mend, (None, {})),
    "response_format": Refusal("say it with 'text': {\"format\": …}"),
    "store": Refusal(_NOT_STORED.mend, (None, False)),
    "truncation": Refusal(
        "leave early items out, or cut the prompt with 'truncate_prompt_tokens'",
        (None, "disabled"),
    ),
}
"""Those of the Responses API, and those that it has another name for."""
HARMLESS_IN_RESPONSES = frozenset({"image", "max_tool_calls", "stream_options"})
"""Of images and of OpenAI's own tools, which are refused; and how events are padded."""


def refuse_foreign(fields: Mapping[str, Any], refused: Mapping[str, Refusal] = REFUSED) -> None:
    """Refuse fields that are not served and ask for another answer. Raises ApiError 400."""
    for name, refusal in unserved(fields, refused):
        message = f"{name} is not served here: {refusal.mend}."
        raise ApiError(400, message, param=name, code="not_served")


def unserved(
    fields: Mapping[str, Any], refused: Mapping[str, Refusal]
) -> Iterator[tuple[str, Refusal]]:
    """The fields that are refused and ask for something."""
    for name, value in fields.items():
        refusal = refused.get(name)
        if refusal is not None and not any(_is(value, nothing) for nothing in refusal.passes):
            yield name, refusal


def _is(value: object, nothing: object) -> bool:
    """Whether two values are equal, where 0 does not equal False."""
    return value == nothing and isinstance(value, bool) == isinstance(nothing, bool)
