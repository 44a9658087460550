"""Ollama's own Python client, unmodified, against a real server."""

from typing import Any

import pytest

from infuse.server.api.ollama_models import OLLAMA, ShowBody
from infuse.server.api.ollama_schemas import (
    HARMLESS_IN_OLLAMA,
    REFUSED_IN_BODY,
    REFUSED_IN_OLLAMA,
    OllamaCall,
    OllamaChatBody,
    OllamaFunction,
    OllamaGenerateBody,
    OllamaMessage,
    OllamaOptions,
)
from tests.api.conftest import RunningServer

pytest.importorskip("ollama", reason="needs Ollama's client: pip install ollama")

import ollama

ASKED: Any = [{"role": "user", "content": "Is it warm?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "w",
        "parameters": {
            "type": "object",
            "properties": {"c": {"type": "string", "enum": ["a", "b"]}},
            "required": ["c"],
        },
    },
}
OPTIONS = {"num_predict": 12, "temperature": 0}


@pytest.fixture
def ai(server: RunningServer) -> ollama.Client:
    return ollama.Client(server.base_url)


def test_it_chats_and_streams_the_same_text(ai: ollama.Client) -> None:
    whole = ai.chat("default", ASKED, options=OPTIONS)
    *chunks, last = ai.chat("default", ASKED, options=OPTIONS, stream=True)
    generated = ai.generate("default", ASKED[0]["content"], options=OPTIONS)
    streamed = list(ai.generate("default", ASKED[0]["content"], options=OPTIONS, stream=True))

    assert whole.message.content
    assert "".join(chunk.message.content or "" for chunk in chunks) == whole.message.content
    assert generated.response == whole.message.content
    assert "".join(chunk.response for chunk in streamed) == generated.response
    assert (last.done, last.done_reason, last.eval_count) == (True, whole.done_reason, 12)


def test_it_reads_log_probabilities(ai: ollama.Client) -> None:
    answer = ai.chat("tiny", ASKED, options=OPTIONS, logprobs=True, top_logprobs=2)

    assert answer.logprobs is not None
    assert len(answer.logprobs) == answer.eval_count
    assert all(len(each.top_logprobs or ()) == 2 for each in answer.logprobs)


def test_it_lists_shows_and_finds_models_loaded(ai: ollama.Client) -> None:
    names = [each.model for each in ai.list().models]

    assert names[0] == "tiny"
    assert {"default", "mlp", "queries"} <= set(names)
    assert ai.show("mlp").capabilities == ["completion"]
    assert ai.ps().models[0].model == "tiny"
    assert OLLAMA.count(".") == 2


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_with_tools_goes_there_and_back(url_with_tools: str, streams: bool) -> None:
    ai = ollama.Client(url_with_tools)
    # The answer is one of two numbers, or a call: some seed makes the model call.
    body: Any = {"model": "tiny", "tools": [TOOL], "format": {"enum": [0, 1]}}
    calling: list[Any] = []
    for seed in range(40):
        options = {"num_predict": 90, "seed": seed}
        answer: Any = ai.chat(messages=ASKED, options=options, stream=streams, **body)
        said = [chunk.message for chunk in answer] if streams else [answer.message]
        calling = [message for message in said if message.tool_calls]
        if calling:
            break

    [message] = calling
    [call] = message.tool_calls
    assert call.function.name == "w"
    assert call.function.arguments["c"] in ("a", "b")
    result = {"role": "tool", "tool_name": "w", "content": "18 degrees"}
    before, after = (
        ai.chat("tiny", conversation, options={"num_predict": 1}).prompt_eval_count or 0
        for conversation in ([*ASKED, message], [*ASKED, message, result])
    )
    assert after > before + len("18 degrees")


def test_calls_that_have_no_ids_are_answered_in_their_order(url_with_tools: str) -> None:
    ai = ollama.Client(url_with_tools)
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("stop", "go", "stop")]
    said = {"role": "assistant", "content": "", "tool_calls": calls}
    results = [
        {"role": "tool", "tool_name": name, "content": name} for name in ("stop", "stop", "go")
    ]
    conversation: Any = [*ASKED, said, *results]

    first, again = (
        ai.chat("tiny", conversation, options={"num_predict": 1}).prompt_eval_count
        for _ in range(2)
    )
    assert first == again
    assert first > ai.chat("tiny", [*ASKED, said], options={"num_predict": 1}).prompt_eval_count


def test_its_errors_carry_ours(ai: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="no model 'nobody'") as unknown:
        ai.chat("nobody", ASKED)
    with pytest.raises(ollama.ResponseError, match="temperature"):
        list(ai.chat("tiny", ASKED, options={"temperature": 9}, stream=True))
    with pytest.raises(ollama.ResponseError, match="PUT /v1/adapters"):
        ai.pull("llama3")

    assert unknown.value.status_code == 404


WALK: list[tuple[Any, Any]] = [
    (ollama._types.ChatRequest, OllamaChatBody),
    (ollama._types.GenerateRequest, OllamaGenerateBody),
    (ollama._types.ShowRequest, ShowBody),
    (ollama.Options, OllamaOptions),
    (ollama.Message, OllamaMessage),
    (ollama.Message.ToolCall, OllamaCall),
    (ollama.Message.ToolCall.Function, OllamaFunction),
]


@pytest.mark.parametrize(("theirs", "ours"), WALK, ids=lambda each: each.__name__)
def test_no_field_of_theirs_is_ignored_unknowingly(theirs: Any, ours: Any) -> None:
    known = ours.model_fields.keys() | REFUSED_IN_BODY.keys() | HARMLESS_IN_OLLAMA

    assert theirs.model_fields.keys() - known == set()


def test_no_field_stands_in_two_lists() -> None:
    served = {name for _, ours in WALK for name in ours.model_fields}

    assert HARMLESS_IN_OLLAMA & REFUSED_IN_OLLAMA.keys() == set()
    assert served & HARMLESS_IN_OLLAMA == set()
    assert served & REFUSED_IN_OLLAMA.keys() == set()
