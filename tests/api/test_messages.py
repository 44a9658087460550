"""Anthropic's Messages API: the answers of chat completions, in another shape."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.test_streaming import CHAT, at_rest, eventually

MESSAGES, COUNT = "/v1/messages", "/v1/messages/count_tokens"
ASKED: list[Any] = [{"role": "user", "content": "Where is my order?"}]
BODY: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "temperature": 0}
JSON = {"content-type": "application/json"}
STOP: Any = {"name": "stop", "input_schema": {"type": "object", "additionalProperties": False}}
CALL: Any = {"type": "tool_use", "id": "a81bc3f02", "name": "stop", "input": {"now": True}}
RESULT: Any = {"type": "tool_result", "tool_use_id": "a81bc3f02", "content": "stopped"}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server: RunningServer) -> Any:
    yield
    assert eventually(lambda: at_rest(server))


@pytest.fixture
def with_tools(url_with_tools: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url_with_tools, timeout=60) as client:
        yield client


def answered(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return dict(response.json())


def refused(response: httpx.Response, status: int = 400) -> str:
    """The message of a refusal that has Anthropic's form."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["request_id"] == response.headers["x-request-id"]
    assert body["error"].keys() == {"type", "message"}
    types = {400: "invalid_request_error", 404: "not_found_error", 413: "request_too_large"}
    assert body["error"]["type"] == types[status]
    return str(body["error"]["message"])


def events(client: httpx.Client, **body: Any) -> list[dict[str, Any]]:
    """The data of a stream's events, each of which is named as its type."""
    response = client.post(MESSAGES, json=BODY | {"stream": True} | body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.strip().split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def in_chat(client: httpx.Client, messages: list[Any], **body: Any) -> dict[str, Any]:
    """The answer of chat completions to a conversation."""
    given = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    return answered(client.post(CHAT, json=given | body))


def counted(client: httpx.Client, messages: list[Any], **body: Any) -> int:
    given = {"model": "tiny", "messages": messages} | body
    return int(answered(client.post(COUNT, json=given))["input_tokens"])


@pytest.mark.parametrize("model", ["tiny", "default", "mlp@1"])
def test_an_answer_is_that_of_chat_completions(client: httpx.Client, model: str) -> None:
    response = client.post(MESSAGES, json=BODY | {"model": model})
    answer = answered(response)
    chat = in_chat(client, ASKED, model=model)
    [choice] = chat["choices"]

    assert answer["content"] == [{"type": "text", "text": choice["message"]["content"]}]
    assert (
        answer["stop_reason"]
        == {"length": "max_tokens", "stop": "end_turn"}[choice["finish_reason"]]
    )
    assert (answer["type"], answer["role"], answer["model"]) == ("message", "assistant", model)
    assert answer["id"].startswith("msg_")
    usage = answer["usage"]
    assert usage["output_tokens"] == chat["usage"]["completion_tokens"]
    read = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert read == chat["usage"]["prompt_tokens"] == counted(client, ASKED, model=model)
    which = {"tiny": None, "default": "default@1", "mlp@1": "mlp@1"}
    assert response.headers.get("infuse-adapter") == which[model]


def test_a_stream_has_anthropics_events_in_their_order(client: httpx.Client) -> None:
    whole = answered(client.post(MESSAGES, json=BODY))
    start, ping, opened, *deltas, closed, last, stop = events(client)

    message = start["message"]
    assert start["type"] == "message_start"
    assert message["id"].startswith("msg_")
    assert (message["content"], message["stop_reason"]) == ([], None)
    assert ping == {"type": "ping"}
    block = {"type": "text", "text": ""}
    assert opened == {"type": "content_block_start", "index": 0, "content_block": block}
    assert {(each["type"], each["index"]) for each in deltas} == {("content_block_delta", 0)}
    assert [{"type": "text", "text": "".join(each["delta"]["text"] for each in deltas)}] == (
        whole["content"]
    )
    assert closed == {"type": "content_block_stop", "index": 0}
    assert last["type"] == "message_delta"
    assert last["delta"] == {name: whole[name] for name in ("stop_reason", "stop_sequence")}
    assert last["usage"]["output_tokens"] == whole["usage"]["output_tokens"]
    read = last["usage"]["input_tokens"] + last["usage"]["cache_read_input_tokens"]
    assert read == message["usage"]["input_tokens"]
    assert stop == {"type": "message_stop"}


@pytest.mark.parametrize(
    "system", ["Be brief.", [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]]
)
def test_the_system_prompt_is_the_first_message(client: httpx.Client, system: Any) -> None:
    answer = answered(client.post(MESSAGES, json=BODY | {"system": system}))
    chat = in_chat(client, [{"role": "system", "content": system}, *ASKED])

    assert answer["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_an_answer_goes_on_with_a_last_message_of_the_assistants(client: httpx.Client) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "It is"}]
    answer = answered(client.post(MESSAGES, json=BODY | {"messages": begun}))
    chat = in_chat(client, begun, continue_final_message=True)

    assert answer["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_the_stop_sequence_that_ended_the_text_is_told(client: httpx.Client) -> None:
    text = answered(client.post(MESSAGES, json=BODY))["content"][0]["text"]
    stops = {"stop_sequences": ["never", text[3]]}
    answer = answered(client.post(MESSAGES, json=BODY | stops))
    *_, last, _ = events(client, **stops)

    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", text[3])
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": text[3]}
    assert "".join(each["text"] for each in answer["content"]) == text[: text.index(text[3])]


def test_calls_and_their_results_are_read_as_chat_completions_read_them(
    with_tools: httpx.Client,
) -> None:
    function = {"name": "stop", "arguments": json.dumps(CALL["input"])}
    call = {"id": CALL["id"], "type": "function", "function": function}
    tools = [{"type": "function", "function": {"name": "stop", "parameters": STOP["input_schema"]}}]

    def read(blocks: list[Any], *after: dict[str, Any]) -> None:
        said = {"role": "assistant", "content": [{"type": "text", "text": "Yes."}, CALL]}
        ours = [*ASKED, said, {"role": "user", "content": blocks}]
        answer = {"role": "assistant", "content": "Yes.", "tool_calls": [call]}
        usage = in_chat(with_tools, [*ASKED, answer, *after], tools=tools, max_tokens=1)["usage"]
        assert counted(with_tools, ours, tools=[STOP]) == usage["prompt_tokens"]

    result = {"role": "tool", "tool_call_id": CALL["id"], "content": "stopped"}
    read([RESULT], result)
    read([RESULT, {"type": "text", "text": "So?"}], result, {"role": "user", "content": "So?"})
    read([RESULT | {"content": [{"type": "text", "text": "stopped"}]}], result)
    read([RESULT | {"content": None}], result | {"content": ""})
    read([RESULT | {"is_error": True}], result | {"content": "Error: stopped"})


@pytest.mark.parametrize(
    ("choice", "same"),
    [
        ({"type": "any"}, "required"),
        ({"type": "tool", "name": "stop"}, {"type": "function", "function": {"name": "stop"}}),
        ({"type": "none"}, "none"),
        ({"type": "auto"}, "auto"),
    ],
)
def test_a_choice_of_tools_means_what_it_means_in_chat_completions(
    with_tools: httpx.Client, choice: dict[str, Any], same: Any
) -> None:
    tools = [{"type": "function", "function": {"name": "stop", "parameters": STOP["input_schema"]}}]
    ours = {"tools": [STOP], "tool_choice": choice | {"disable_parallel_tool_use": True}}
    if choice["type"] == "none":
        del ours["tool_choice"]["disable_parallel_tool_use"]
    answer = answered(with_tools.post(MESSAGES, json=BODY | ours | {"max_tokens": 100}))
    theirs = {"tools": tools, "tool_choice": same, "parallel_tool_calls": False}
    message = in_chat(with_tools, ASKED, max_tokens=100, **theirs)["choices"][0]["message"]

    calls = [each for each in answer["content"] if each["type"] == "tool_use"]
    said = "".join(each["text"] for each in answer["content"] if each["type"] == "text")
    assert said == (message["content"] or "")
    assert [(each["name"], each["input"]) for each in calls] == [
        (each["function"]["name"], json.loads(each["function"]["arguments"]))
        for each in message.get("tool_calls") or ()
    ]
    assert (answer["stop_reason"] == "tool_use") == bool(calls)
    assert bool(calls) == (choice["type"] in ("any", "tool"))


def test_an_answer_is_held_to_a_schema(client: httpx.Client) -> None:
    format = {"type": "json_schema", "schema": {"enum": ["yes", "no"]}}
    answer = answered(client.post(MESSAGES, json=BODY | {"output_config": {"format": format}}))

    assert json.loads(answer["content"][0]["text"]) in ("yes", "no")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "window"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [CALL]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": [RESULT]}]}, "messages.0.content"),
        ({"messages": [*ASKED, {"role": "assistant", "content": [CALL]}]}, "send what follows"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [STOP | {"defer_loading": True}]}, "defer_loading is not served"),
        ({"tools": [STOP, STOP]}, "second function named 'stop'"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"output_config": {"effort": "low"}}, "effort is not served"),
        ({"mcp_servers": [{"name": "x"}]}, "mcp_servers is not served"),
        ({"seed": 7}, "/v1/chat/completions"),
        ({"lora_path": "x"}, "as 'model'"),
        ({"temperature": 3, "top_p": 2}, "temperature: "),
        ({"temperature": 3, "top_p": 2}, "; top_p: "),
    ],
)
def test_what_is_not_served_is_refused_with_its_name(
    client: httpx.Client, changed: dict[str, Any], said: str
) -> None:
    assert said in refused(client.post(MESSAGES, json=BODY | changed))


def test_errors_have_anthropics_form_wherever_they_arise(
    client: httpx.Client, server: RunningServer
) -> None:
    unknown = client.post(MESSAGES, json=BODY | {"model": "nobody"})
    assert "no model 'nobody'" in refused(unknown, 404)
    assert "no model" in refused(client.post(COUNT, json={"model": "x", "messages": ASKED}), 404)
    assert "no valid JSON" in refused(client.post(MESSAGES, content=b"{", headers=JSON))
    assert "Content-Type" in refused(client.post(MESSAGES, content=b"{}"))
    too_long = b" " * (server.services.settings.max_body_bytes + 1)
    assert "limit" in refused(client.post(MESSAGES, content=too_long, headers=JSON), 413)
    assert "nothing at" in refused(client.post("/v1/messages/batches", json={}), 404)
