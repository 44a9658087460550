"""Calls that the model decides to make, with OpenAI's own client."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from infuse.server.settings import Settings
from tests.api.conftest import run_server, save_model
from tests.api.test_tools import WEATHER, ask, check
from tests.chat_templates import HERMES
from tests.factories import TOKENS, tiny_tokenizer

pytestmark = pytest.mark.native
"""On vLLM calls under `auto` are free."""


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """A model that prefers the mark of a call, which is one token of its tokenizer, as Qwen's."""
    root = tmp_path_factory.mktemp("marked")
    model = save_model(root / "model", HERMES, max_position_embeddings=2048, vocab_size=264)
    tokenizer = tiny_tokenizer(HERMES)
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save_pretrained(model)
    settings = Settings(model=str(model), served_model_name="tiny", adapters_dir=root / "store")
    with (
        run_server(settings) as (url, _),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


CALLS: Any = {"logit_bias": {str(TOKENS): 100}}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_call_that_the_model_has_begun_is_held_to_its_schema(
    marked: OpenAI, seed: int, stream: bool
) -> None:
    body = {"seed": seed, "parallel_tool_calls": False, **CALLS}
    if not stream:
        [choice] = ask(marked, **body).choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        [call] = choice.message.tool_calls
        check(call)
        return
    chunks = [chunk.choices[0] for chunk in ask(marked, stream=True, **body)]
    parts = [part for chunk in chunks for part in chunk.delta.tool_calls or ()]
    assert chunks[-1].finish_reason == "tool_calls"
    assert [part.function.name for part in parts if part.id] == [parts[0].function.name]
    whole = "".join(part.function.arguments for part in parts)
    assert whole == ask(marked, **body).choices[0].message.tool_calls[0].function.arguments


def test_a_mark_that_is_a_token_of_its_own_is_written_as_one(marked: OpenAI) -> None:
    choices = ask(marked, tool_choice="required", n=6, seed=1, max_tokens=900).choices

    whole = [choice.message for choice in choices if choice.finish_reason == "tool_calls"]
    for message in whole:
        assert message.content is None
        for call in message.tool_calls:
            check(call)
    assert max(len(message.tool_calls) for message in whole) > 1


def test_what_is_said_before_a_call_is_free(marked: OpenAI) -> None:
    """A bias that a call wins with only now and then: some text comes first."""
    choices = ask(marked, n=12, seed=1, logit_bias={str(TOKENS): 2}, max_tokens=700).choices
    calling = [choice for choice in choices if choice.finish_reason == "tool_calls"]

    assert any(choice.message.content for choice in calling)
    for choice in calling:
        for call in choice.message.tool_calls:
            check(call)


def test_a_call_that_the_token_limit_cuts_says_so(marked: OpenAI) -> None:
    body = {"tools": [WEATHER], "seed": 1, "max_tokens": 64, **CALLS}
    [choice] = ask(marked, **body).choices

    assert choice.finish_reason == "length"
    [call] = choice.message.tool_calls
    assert call.function.name == "get_weather"
    with pytest.raises(json.JSONDecodeError):
        json.loads(call.function.arguments)


def test_a_schema_that_cannot_be_held_is_refused_where_it_must_be(marked: OpenAI) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {}}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    strict = {"type": "function", "function": {**tool["function"], "strict": True}}

    [choice] = ask(marked, tools=[tool], seed=1, max_tokens=700, **CALLS).choices
    for call in choice.message.tool_calls:
        assert call.function.name == "f"
    with pytest.raises(openai.BadRequestError, match=r"\$\.properties\.a\.not"):
        ask(marked, tools=[strict], **CALLS)
