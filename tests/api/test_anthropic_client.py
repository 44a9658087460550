"""Anthropic's own Python client, unmodified, against a real server."""

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import httpx
import pytest

from infuse.server.api.messages_schemas import (
    HARMLESS_IN_MESSAGES,
    REFUSED_IN_MESSAGES,
    AnthropicMessage,
    AnthropicTool,
    AnthropicToolChoice,
    CountTokensBody,
    JsonFormat,
    MessagesBody,
    OutputConfig,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from tests.api.conftest import RunningServer

pytest.importorskip("anthropic", reason="needs Anthropic's client: pip install anthropic")

import anthropic
from anthropic import Anthropic, types
from anthropic.types import message_count_tokens_params, message_create_params
from anthropic.types.beta import message_create_params as beta_params

ASKED: Any = [{"role": "user", "content": "Where is my order?"}]
TOOLS: Any = [
    {
        "name": "get_weather",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
]
GREEDY = {"temperature": 0}
"""The client has no parameter for it."""
ANY: Any = {"type": "any", "disable_parallel_tool_use": True}


@pytest.fixture(scope="module")
def ai(server: RunningServer) -> Iterator[Anthropic]:
    with Anthropic(base_url=server.base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def with_tools(url_with_tools: str) -> Iterator[Anthropic]:
    with Anthropic(base_url=url_with_tools, api_key="none", max_retries=0) as client:
        yield client


def test_its_stream_helper_collects_the_answer(ai: Anthropic) -> None:
    body: Any = {"model": "default", "messages": ASKED, "max_tokens": 12, "extra_body": GREEDY}
    whole = ai.messages.create(**body)
    with ai.messages.stream(**body) as stream:
        text = "".join(stream.text_stream)
        collected = stream.get_final_message()

    assert text == whole.content[0].text  # type: ignore[union-attr]
    assert collected.to_dict()["content"] == whole.to_dict()["content"]
    assert (collected.stop_reason, collected.role) == (whole.stop_reason, "assistant")
    assert collected.usage.output_tokens == whole.usage.output_tokens
    counted = ai.messages.count_tokens(model="default", messages=ASKED).input_tokens
    for usage in (whole.usage, collected.usage):
        assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == counted


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_with_tools_goes_there_and_back(
    with_tools: Anthropic, streams: bool
) -> None:
    body: Any = {"model": "tiny", "max_tokens": 400, "tools": TOOLS}
    if streams:
        with with_tools.messages.stream(**body, messages=ASKED, tool_choice=ANY) as stream:
            answer: Any = stream.get_final_message()
    else:
        answer = with_tools.messages.create(**body, messages=ASKED, tool_choice=ANY)

    [call] = answer.content
    assert (call.type, call.name, answer.stop_reason) == ("tool_use", "get_weather", "tool_use")
    assert call.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "18 degrees"}
    said = [*ASKED, answer.to_param(), {"role": "user", "content": [result]}]
    after = with_tools.messages.create(**body | {"max_tokens": 3}, messages=said)
    assert after.usage.output_tokens == 3


def test_an_answer_that_the_token_limit_cuts_has_the_arguments_so_far(
    with_tools: Anthropic,
) -> None:
    body: Any = {"model": "tiny", "messages": ASKED, "tools": TOOLS, "tool_choice": ANY}
    body |= {"extra_body": GREEDY}
    whole = with_tools.messages.create(**body, max_tokens=400)
    most = whole.usage.output_tokens - 25
    cut: Any = with_tools.messages.create(**body, max_tokens=most)
    with with_tools.messages.stream(**body, max_tokens=most) as stream:
        streamed: Any = stream.get_final_message()

    assert (whole.stop_reason, cut.stop_reason) == ("tool_use", "max_tokens")
    assert cut.content[0].name == "get_weather"
    assert cut.content[0].input == streamed.content[0].input


def test_its_errors_are_of_their_classes(ai: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="no model 'nobody'"):
        ai.messages.create(model="nobody", messages=ASKED, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError, match="temperature") as bad:
        ai.messages.create(
            model="tiny", messages=ASKED, max_tokens=1, extra_body={"temperature": 9}
        )

    assert bad.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    assert bad.value.body["request_id"]  # type: ignore[index]


@pytest.mark.client("anthropic", "models, listed page by page and looked up")
def test_it_lists_and_finds_models(ai: Anthropic, client: httpx.Client) -> None:
    named = [model["id"] for model in client.get("/v1/models").json()["data"]]

    for limit in (1, 2, 1000):
        listed = list(ai.models.list(limit=limit))
        assert [model.id for model in listed] == named
    for model in listed:
        types.ModelInfo.model_validate(model.to_dict())
        assert model.display_name == model.id
        assert model.max_tokens < model.max_input_tokens  # type: ignore[operator]
        assert ai.models.retrieve(model.id) == model
    assert ai.models.list().has_next_page() is False
    with pytest.raises(anthropic.NotFoundError, match="no model 'nobody'"):
        ai.models.retrieve("nobody")


def test_it_is_told_that_pages_go_forward_only(ai: Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match="by after_id"):
        ai.models.list(before_id="tiny")


WALK: list[tuple[Any, Any]] = [
    (message_create_params.MessageCreateParamsBase, MessagesBody),
    (message_create_params.MessageCreateParamsStreaming, MessagesBody),
    (message_count_tokens_params.MessageCountTokensParams, CountTokensBody),
    (beta_params.MessageCreateParamsBase, MessagesBody),
    (types.TextBlockParam, TextBlock),
    (types.ThinkingBlockParam, ThinkingBlock),
    (types.ToolUseBlockParam, ToolUseBlock),
    (types.ToolResultBlockParam, ToolResultBlock),
    (types.ToolParam, AnthropicTool),
    (types.ToolChoiceAutoParam, AnthropicToolChoice),
    (types.ToolChoiceToolParam, AnthropicToolChoice),
    (types.OutputConfigParam, OutputConfig),
    (types.JSONOutputFormatParam, JsonFormat),
    *((kind, AnthropicMessage) for kind in get_args(types.MessageParam)),
]


@pytest.mark.parametrize(("theirs", "ours"), WALK, ids=lambda each: each.__name__)
def test_no_field_of_theirs_is_ignored_unknowingly(theirs: Any, ours: Any) -> None:
    served = {field.alias or name for name, field in ours.model_fields.items()}
    known = served | REFUSED_IN_MESSAGES.keys() | HARMLESS_IN_MESSAGES

    assert theirs.__annotations__.keys() - known == set()


def test_no_field_stands_in_two_lists() -> None:
    served = {name for _, ours in WALK for name in ours.model_fields}

    assert HARMLESS_IN_MESSAGES & REFUSED_IN_MESSAGES.keys() == set()
    assert served & HARMLESS_IN_MESSAGES == set()
    assert served & REFUSED_IN_MESSAGES.keys() == set()


@pytest.mark.parametrize("kind", get_args(types.ContentBlockParam), ids=lambda kind: kind.__name__)
def test_every_kind_of_block_is_read_or_refused(ai: Anthropic, kind: Any) -> None:
    [tag] = get_args(get_type_hints(kind)["type"])
    block: Any = {"type": tag, "text": "a", "thinking": "a", "signature": "a"}
    block |= {"id": "a", "name": "a", "input": {}, "tool_use_id": "a"}
    role = "user" if tag in ("text", "tool_result") else "assistant"
    body: Any = [*ASKED, {"role": role, "content": [block]}, *ASKED]
    if tag in ("text", "thinking", "tool_use", "tool_result"):
        assert ai.messages.count_tokens(model="tiny", messages=body).input_tokens
    else:
        with pytest.raises(anthropic.BadRequestError, match=f"'{tag}'"):
            ai.messages.count_tokens(model="tiny", messages=body)


def test_what_a_refused_field_asks_for_is_refused_and_a_harmless_one_changes_nothing(
    ai: Anthropic,
) -> None:
    body: Any = {"model": "tiny", "messages": ASKED, "max_tokens": 4}
    plain = ai.messages.create(**body, extra_body=GREEDY).content
    tops = beta_params.MessageCreateParamsBase.__annotations__.keys()

    for name in REFUSED_IN_MESSAGES.keys() & tops:
        with pytest.raises(anthropic.BadRequestError, match=f"{name} is not served here"):
            ai.messages.create(**body, extra_body={name: {"x": "y"}})
        assert ai.messages.create(**body, extra_body=GREEDY | {name: None}).content == plain
    harmless = dict.fromkeys(HARMLESS_IN_MESSAGES & tops, "x")
    assert ai.messages.create(**body, extra_body=GREEDY | harmless).content == plain
