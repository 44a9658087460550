"""The path of a new user: the command line, the default model, OpenAI's own client."""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from tests.served import served_by

pytestmark = pytest.mark.real

ADAPTERS = Path(__file__).parents[1] / "examples" / "adapters"
EXPECTED = json.loads((ADAPTERS / "expected.json").read_text())
BASE = "smollm2-135m-instruct"
CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    """OpenAI's client, for a server that `infuse serve` started in a process of its own."""
    folder = tmp_path_factory.mktemp("server")
    infuse = Path(sys.executable).with_name("infuse")
    command = [infuse, "serve", "--port", "0", "--max-model-len", "1024"]
    command += ["--adapters-dir", folder / "store", "--preload-adapters", ADAPTERS]
    with served_by(command, folder / "log") as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_base_knows_the_capital_of_france(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=CAPITAL, temperature=0)

    assert answer.choices[0].message.content == "The capital of France is Paris."


def test_a_stream_brings_the_same_text(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE, messages=CAPITAL, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    assert text == "The capital of France is Paris."


def test_logprobs_say_how_sure_the_base_was(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=BASE, messages=CAPITAL, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    tokens = answer.choices[0].logprobs.content or []

    assert " Paris" in [token.token for token in tokens]
    for token in tokens:
        assert token.top_logprobs[0].token == token.token
        assert token.logprob <= 0
        assert len(token.top_logprobs) == 3


WEATHER: Any = {
    "name": "get_weather",
    "description": "Say the weather of a city.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_the_base_calls_a_tool_and_reads_its_result(client: OpenAI) -> None:
    asked: list[Any] = [{"role": "user", "content": "How is the weather in Paris?"}]
    tools: Any = [{"type": "function", "function": WEATHER}]
    ask = partial(client.chat.completions.create, model=BASE, tools=tools, temperature=0)
    called = ask(messages=asked, tool_choice="required", parallel_tool_calls=False, max_tokens=64)
    message = called.choices[0].message
    assert message.tool_calls is not None
    [call] = message.tool_calls

    result = {"role": "tool", "tool_call_id": call.id, "content": "Sunny"}
    told = ask(messages=[*asked, message, result], tool_choice="none", max_tokens=8)

    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    assert told.choices[0].message.content


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_adapter_answers_as_in_training_and_unlike_the_base(
    client: OpenAI, name: str
) -> None:
    for kept in EXPECTED[name]:
        answers = {}
        for model in (name, BASE):
            answer = client.chat.completions.create(
                model=model, messages=kept["messages"], temperature=0, max_tokens=64
            )
            answers[model] = answer.choices[0].message.content

        assert answers[name] == kept["answer"]
        assert answers[BASE] != answers[name]


def test_base_and_adapters_are_models(client: OpenAI) -> None:
    models = {model.id: model for model in client.models.list()}

    assert set(models) == {BASE, *EXPECTED}
    assert all(models[name].model_extra["parent"] == BASE for name in EXPECTED)
