"""`response_format` and `structured_outputs` over HTTP, and with OpenAI's own client."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field

from tests.api.conftest import RunningServer
from tests.api.test_bad_generation_input import refused
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS, at_rest, eventually

BOTH = [COMPLETIONS, CHAT]
ASKED = [{"role": "user", "content": "Hi"}]


class Order(BaseModel):
    model_config = ConfigDict(extra="forbid")

    item: Literal["chair", "table"]
    quantity: int = Field(ge=1, le=99)
    note: str = Field(max_length=4)


FORMAT = {"type": "json_schema", "json_schema": {"name": "o", "schema": Order.model_json_schema()}}


@pytest.fixture(scope="module")
def ai(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server: RunningServer) -> Any:
    yield
    assert eventually(lambda: at_rest(server))


def text_of(client: httpx.Client, path: str, **body: Any) -> str:
    response = client.post(path, json={"model": "tiny", **PROMPTS[path], "max_tokens": 150} | body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return str(choice["text"] if path == COMPLETIONS else choice["message"]["content"])


@pytest.mark.parametrize("path", BOTH)
def test_every_kind_of_constraint_holds(client: httpx.Client, path: str) -> None:
    schema = Order.model_json_schema()

    def ask(**constraint: Any) -> str:
        return text_of(client, path, structured_outputs=constraint, seed=3)

    assert ask(choice=["yes", "no"]) in ("yes", "no")
    assert re.fullmatch("[0-9]{4}-[01]", ask(regex="[0-9]{4}-[01]"))
    assert ask(grammar='root ::= "a" ("b" | "c")') in ("ab", "ac")
    for given in (schema, json.dumps(schema)):
        Order.model_validate_json(ask(json=given))


def test_rows_of_all_kinds_run_together(client: httpx.Client) -> None:
    def ask(row: int) -> None:
        name = ("tiny", "default", "queries")[row % 3]
        if row % 2:
            answer = text_of(client, CHAT, model=name, response_format=FORMAT, seed=row)
            Order.model_validate_json(answer)
        else:
            choice = {"choice": ["one", "two"]}
            answer = text_of(client, COMPLETIONS, model=name, structured_outputs=choice, seed=row)
            assert answer in ("one", "two")

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(32)))


def test_several_choices_each_match_and_differ(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": ASKED, "n": 4, "seed": 1, "response_format": FORMAT}
    answer = client.post(CHAT, json=body).json()

    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len({Order.model_validate_json(text).model_dump_json() for text in texts}) > 1


def test_what_the_limit_cuts_says_so(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 5, "response_format": FORMAT}
    [choice] = client.post(CHAT, json=body).json()["choices"]

    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"].startswith("{")


def test_openais_client_creates_parses_and_streams(ai: OpenAI) -> None:
    created = ai.chat.completions.create(
        model="tiny", messages=ASKED, response_format=FORMAT, seed=1
    )
    parsed = ai.chat.completions.parse(
        model="default", messages=ASKED, response_format=Order, seed=1
    )
    with ai.chat.completions.stream(
        model="tiny", messages=ASKED, response_format=Order, seed=1
    ) as stream:
        streamed = stream.get_final_completion()

    text = created.choices[0].message.content
    assert text is not None
    assert parsed.choices[0].message.parsed is not None
    assert parsed.choices[0].finish_reason == "stop"
    assert streamed.choices[0].message.parsed == Order.model_validate_json(text)


def test_a_json_object_is_one(client: httpx.Client) -> None:
    brace = "}"
    bias = {str(5 + sorted(map(chr, range(33, 127))).index(brace)): 100}
    answer = text_of(client, CHAT, response_format={"type": "json_object"}, logit_bias=bias)

    assert isinstance(json.loads(answer), dict)


def test_text_is_no_constraint(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": ASKED, "max_tokens": 8, "temperature": 0}
    free = client.post(CHAT, json=body).json()["choices"]

    assert (
        client.post(CHAT, json=body | {"response_format": {"type": "text"}}).json()["choices"]
        == free
    )


@pytest.mark.parametrize(
    ("format", "param", "said"),
    [
        ("json", "response_format", "dictionary"),
        ({"type": "xml"}, "response_format.type", "json_schema"),
        ({"type": "json_schema"}, "response_format", "comes with the type"),
        ({"type": "json_object", "json_schema": FORMAT["json_schema"]}, "response_format", "only"),
        (FORMAT | {"json_schema": {"name": "o"}}, "response_format.json_schema.schema", "required"),
        (
            FORMAT | {"json_schema": {"name": "o", "schema": {"items": {"type": "word"}}}},
            "response_format.json_schema.schema",
            "at $.items.type, 'word'",
        ),
        (
            FORMAT | {"json_schema": {"name": "o", "schema": {"items": {"not": {}}}}},
            "response_format.json_schema.schema",
            "not supported: $.items.not",
        ),
    ],
)
def test_a_bad_response_format_is_refused_with_the_place(
    client: httpx.Client, format: object, param: str, said: str
) -> None:
    body = {"model": "tiny", "messages": ASKED, "response_format": format}
    error = refused(client.post(CHAT, json=body))

    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("constraint", "param", "said"),
    [
        ("yes", "structured_outputs", "dictionary"),
        ({}, "structured_outputs", "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs", "exactly one"),
        ({"structural_tag": {}}, "structured_outputs.structural_tag", "not permitted"),
        ({"choice": []}, "structured_outputs.choice", "at least 1"),
        ({"choice": ["a", ""]}, "structured_outputs.choice.1", "at least 1"),
        ({"json": "{"}, "structured_outputs.json", "is no JSON"),
        ({"json": "3"}, "structured_outputs.json", "no JSON schema"),
        ({"regex": "(a"}, "structured_outputs.regex", "unclosed group"),
        ({"grammar": "start: b"}, "structured_outputs.grammar", "unknown name"),
    ],
)
def test_bad_structured_outputs_are_refused_with_the_place(
    client: httpx.Client, path: str, constraint: object, param: str, said: str
) -> None:
    body = {"model": "tiny", **PROMPTS[path], "structured_outputs": constraint}
    error = refused(client.post(path, json=body))

    assert error["param"] == param
    assert said in error["message"]


def test_two_constraints_exclude_each_other(client: httpx.Client) -> None:
    body = {"model": "tiny", "messages": ASKED, "response_format": FORMAT}
    error = refused(client.post(CHAT, json=body | {"structured_outputs": {"regex": "a"}}))

    assert error["param"] == "structured_outputs"
    assert "response_format" in error["message"]


@pytest.mark.native
def test_a_grammar_that_outgrows_its_limits_is_the_requests_fault(client: httpx.Client) -> None:
    hostile = {"grammar": 'start: s\ns: s s s | s s | "a" | "b"'}
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 150, "structured_outputs": hostile}
    error = refused(client.post(COMPLETIONS, json=body | {"ignore_eos": True}))

    assert error["code"] == "invalid_constraint"
    assert "simplify it" in error["message"]
