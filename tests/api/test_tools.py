"""Tools and their calls over HTTP, with OpenAI's own client."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel

from infuse.adapters.vocabulary.vocabulary import Vocabulary
from infuse.server.api.tool_formats import find_format
from tests.api.conftest import RunningServer, save_model
from tests.api.test_bad_generation_input import refused
from tests.api.test_streaming import CHAT
from tests.chat_templates import MISTRAL
from tests.factories import TOKENS, tiny_tokenizer

ASKED: list[Any] = [{"role": "user", "content": "Is it warm?"}]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]
    days: Literal[1, 2] | None


WEATHER: Any = pydantic_function_tool(Weather, name="get_weather")
STOP: Any = {"type": "function", "function": {"name": "stop"}}
NAMED: Any = {"type": "function", "function": {"name": "stop"}}


@pytest.fixture
def url(url_with_tools: str) -> str:
    return url_with_tools


@pytest.fixture
def ai(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(ai: OpenAI, **body: Any) -> Any:
    return ai.chat.completions.create(
        **{"model": "tiny", "messages": ASKED, "tools": [WEATHER, STOP], "max_tokens": 400} | body
    )


def check(call: Any) -> None:
    assert call.type == "function"
    if call.function.name == "stop":
        assert json.loads(call.function.arguments) == {}
    else:
        assert call.function.name == "get_weather"
        Weather.model_validate_json(call.function.arguments)


@pytest.mark.parametrize("seed", range(6))
def test_required_calls_parse_and_validate(ai: OpenAI, seed: int) -> None:
    [choice] = ask(ai, tool_choice="required", parallel_tool_calls=False, seed=seed).choices

    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    [call] = choice.message.tool_calls
    check(call)


def test_several_calls_may_be_required(ai: OpenAI) -> None:
    choices = ask(ai, tool_choice="required", n=8, seed=1, max_tokens=700).choices
    calls = [choice.message.tool_calls for choice in choices if choice.finish_reason != "length"]

    assert max(len(each) for each in calls) > 1
    for call in (call for each in calls for call in each):
        check(call)
    assert len({call.id for each in calls for call in each}) == sum(map(len, calls))


def test_a_named_function_is_called_once(ai: OpenAI) -> None:
    [choice] = ask(ai, tool_choice=NAMED).choices

    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("stop", {})
    assert choice.finish_reason == "stop"
    *_, last = ask(ai, tool_choice=NAMED, stream=True)
    assert last.choices[0].finish_reason == "stop"


def test_a_streamed_call_is_the_same(ai: OpenAI) -> None:
    body = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 4}
    [whole] = ask(ai, **body).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in ask(ai, stream=True, **body)]

    first, *rest = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert (first.index, first.type, len(first.id)) == (0, "function", 9)
    assert first.function.name == whole.function.name
    assert all((each.index, each.id, each.function.name) == (0, None, None) for each in rest)
    assert len(rest) > 5
    written = first.function.arguments + "".join(each.function.arguments for each in rest)
    assert written == whole.function.arguments
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls"


def test_openais_helpers_parse_the_arguments(ai: OpenAI) -> None:
    body: Any = {"model": "tiny", "messages": ASKED, "tools": [WEATHER], "seed": 2}
    body |= {"tool_choice": "required", "parallel_tool_calls": False}

    parsed = ai.chat.completions.parse(**body)
    with ai.chat.completions.stream(**body) as stream:
        streamed = stream.get_final_completion()

    for answer in (parsed, streamed):
        [call] = answer.choices[0].message.tool_calls or ()
        assert isinstance(call.function.parsed_arguments, Weather)


def test_a_format_binds_what_is_said_and_tools_what_is_called(ai: OpenAI) -> None:
    format = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x", "y"]}}}
    choices = ask(ai, response_format=format, n=12, seed=1).choices

    for choice in choices:
        if choice.finish_reason == "tool_calls":
            for call in choice.message.tool_calls:
                check(call)
        if choice.finish_reason == "stop":
            assert json.loads(choice.message.content) in ("x", "y")
    assert {choice.finish_reason for choice in choices} >= {"stop"}


def test_a_conversation_goes_on_after_calls(ai: OpenAI) -> None:
    [call] = ask(ai, tool_choice=NAMED).choices[0].message.tool_calls
    said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    result = {"role": "tool", "tool_call_id": call.id, "content": "stopped"}

    with_both = ask(ai, messages=[*ASKED, said, result], max_tokens=1)
    written = '<|assistant|><tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
    plain = ask(ai, max_tokens=1)
    tokens = len(tiny_tokenizer().encode(written + "<|tool|>stopped"))

    assert with_both.usage.prompt_tokens == plain.usage.prompt_tokens + tokens


def test_no_choice_is_no_tools(ai: OpenAI) -> None:
    without = ask(ai, tool_choice="none", max_tokens=5, temperature=0)
    plain = ai.chat.completions.create(model="tiny", messages=ASKED, max_tokens=5, temperature=0)

    assert without.usage == plain.usage
    assert without.choices == plain.choices


def test_the_model_may_answer_in_words(ai: OpenAI) -> None:
    [choice] = ask(ai, max_tokens=20, seed=1).choices

    assert choice.message.content
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"


@pytest.mark.parametrize(
    ("changed", "param", "said"),
    [
        ({"tools": {}}, "tools", "list"),
        ({"tools": [{"type": "function"}]}, "tools.0.function", "required"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name", "required"),
        ({"tools": [{"type": "web", "function": {"name": "f"}}]}, "tools.0.type", "function"),
        ({"tools": [STOP, WEATHER, STOP]}, "tools", "second function named 'stop'"),
        ({"tool_choice": "always"}, "tool_choice", '"none", "auto", "required"'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "go"}}},
            "tool_choice",
            "'go', but the tools are ['get_weather', 'stop']",
        ),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "exclude"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.tool_call_id", "missing"),
        ({"messages": [{"role": "tool", "tool_call_id": "a"}]}, "messages.0.content", "missing"),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": "x",
                        "tool_calls": [
                            {
                                "id": "a",
                                "type": "function",
                                "function": {"name": "f", "arguments": "{}"},
                            }
                        ],
                    }
                ]
            },
            "messages.0.tool_calls",
            "assistant",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "a",
                                "type": "function",
                                "function": {"name": "f", "arguments": "[]"},
                            }
                        ],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "JSON object",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "parameters": {"properties": {"a": {"not": {}}}}},
                    }
                ],
            },
            "tools[0].function.parameters",
            "$.properties.a.not",
        ),
    ],
)
def test_bad_tools_are_refused_with_the_place(
    url: str, changed: dict[str, Any], param: str, said: str
) -> None:
    body = {"model": "tiny", "messages": ASKED, "tools": [WEATHER, STOP]} | changed
    error = refused(httpx.post(url + CHAT, json=body))

    assert error["param"] == param
    assert said in error["message"]


def test_a_template_without_a_place_for_tools_is_told(server: RunningServer) -> None:
    body = {"model": "tiny", "messages": ASKED, "tools": [STOP]}
    error = refused(httpx.post(server.base_url + CHAT, json=body))

    assert error["param"] == "tools"
    assert "no place for tools" in error["message"]


def test_a_template_that_writes_calls_in_an_unknown_way_is_told(
    start_server: Callable[..., tuple[str, Any]], tmp_path: Path
) -> None:
    strange = "{{ tools }}{% for message in messages %}{{ message.content }}{% endfor %}"
    url, _ = start_server(model=str(save_model(tmp_path / "strange", strange)))

    error = refused(
        httpx.post(url + CHAT, json={"model": "tiny", "messages": ASKED, "tools": [STOP]})
    )

    assert error["param"] == "tools"
    assert "response_template" in error["message"]


def test_ids_fit_mistrals_templates(
    start_server: Callable[..., tuple[str, Any]], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "mistral", MISTRAL, max_position_embeddings=2048)
    assert find_format(Vocabulary(tiny_tokenizer(MISTRAL), TOKENS)) is not None
    url, _ = start_server(model=str(model))
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as ai:
        [call] = ask(ai, tool_choice=NAMED).choices[0].message.tool_calls
        said = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
        result = {"role": "tool", "tool_call_id": call.id, "content": "stopped"}

        assert ask(ai, messages=[*ASKED, said, result], max_tokens=1).choices
        with pytest.raises(openai.BadRequestError, match="nine characters"):
            ask(ai, messages=[*ASKED, said, result | {"tool_call_id": "call_1"}], max_tokens=1)


def test_a_call_without_arguments_in_the_history_has_none(ai: OpenAI) -> None:
    def said(arguments: str) -> list[Any]:
        function = {"name": "stop", "arguments": arguments}
        call = {"id": "a81bc3f02", "type": "function", "function": function}
        answer = {"role": "assistant", "content": None, "tool_calls": [call]}
        return [*ASKED, answer, {"role": "tool", "tool_call_id": call["id"], "content": "done"}]

    def tokens(messages: list[Any]) -> int:
        return int(ask(ai, messages=messages, max_tokens=1).usage.prompt_tokens)

    assert tokens(said("")) == tokens(said(" \n")) == tokens(said("{}"))
    with pytest.raises(openai.BadRequestError, match=r"messages\.1\.tool_calls\.0"):
        ask(ai, messages=said("nothing"))


@pytest.mark.parametrize(
    ("message", "like"),
    [
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant"}, ""),
        ({"role": "assistant", "content": []}, ""),
        ({"role": "assistant", "content": None, "refusal": "No."}, "No."),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"role": "tool", "tool_call_id": "a", "content": [{"type": "text", "text": "b"}]}, "b"),
        ({"role": "developer", "content": [{"type": "text", "text": "b"}]}, "b"),
    ],
)
def test_every_form_of_a_content_is_read(ai: OpenAI, message: Any, like: str) -> None:
    plain = {k: v for k, v in message.items() if k != "refusal"} | {"content": like}

    read = ask(ai, messages=[*ASKED, message], max_tokens=3, temperature=0)
    same = ask(ai, messages=[*ASKED, plain], max_tokens=3, temperature=0)
    assert (read.usage.prompt_tokens, read.choices) == (same.usage.prompt_tokens, same.choices)
