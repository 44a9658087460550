"""`/tokenize` and its like, as vLLM has them; and what is asked of a server beside them."""

import json
from typing import Any

import httpx
import pytest

from infuse.server.services import Services
from tests.api.conftest import RunningServer
from tests.api.test_bad_generation_input import refused
from tests.api.test_streaming import CHAT, COMPLETIONS

MESSAGES = [{"role": "user", "content": "Hi"}]
FAR = 10**30


@pytest.fixture
def services(server: RunningServer) -> Services:
    return server.services


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.mark.parametrize("model", [None, "tiny", "default", "default@1"])
def test_a_text_becomes_the_tokens_that_a_completion_has(
    client: httpx.Client, services: Services, model: str | None
) -> None:
    named = {} if model is None else {"model": model}
    answer = ask(client, "/tokenize", prompt="abc", return_token_strs=True, **named)

    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 1}
    usage = client.post(COMPLETIONS, json=asked).json()["usage"]
    tokenizer = services.engine.model.tokenizer
    assert answer["tokens"] == tokenizer.encode("abc")
    assert answer["count"] == usage["prompt_tokens"] == len(answer["tokens"])
    assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
    assert answer["max_model_len"] == services.engine.model.max_model_len
    assert ask(client, "/detokenize", tokens=answer["tokens"], **named)["prompt"] == "abc"


def test_a_conversation_becomes_the_tokens_that_a_chat_has(client: httpx.Client) -> None:
    answer = ask(client, "/tokenize", messages=MESSAGES)
    open_ended = ask(client, "/tokenize", messages=MESSAGES, add_generation_prompt=False)

    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 1}
    assert answer["count"] == client.post(CHAT, json=body).json()["usage"]["prompt_tokens"]
    assert answer["token_strs"] is None
    assert open_ended["count"] < answer["count"]


def test_no_text_has_no_tokens_and_special_tokens_are_a_choice(
    client: httpx.Client, services: Services
) -> None:
    tokenizer = services.engine.model.tokenizer
    plain = ask(client, "/tokenize", prompt="a</s>", add_special_tokens=False)["tokens"]

    assert ask(client, "/tokenize", prompt="")["tokens"] == tokenizer.encode("")
    assert plain == tokenizer.encode("a</s>", add_special_tokens=False)
    assert ask(client, "/detokenize", tokens=plain)["prompt"] == "a</s>"
    assert ask(client, "/detokenize", tokens=[])["prompt"] == ""


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/tokenize", {}, "give a prompt or messages"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "and not both"),
        ("/tokenize", {"prompt": ["a", "b"]}, "string"),
        ("/tokenize", {"messages": []}, "at least 1"),
        ("/tokenize", {"messages": MESSAGES, "chat_template": "{{ x }}"}, "not served here"),
        ("/tokenize", {"prompt": "a\ud800"}, "surrogate"),
        ("/detokenize", {}, "required"),
        ("/detokenize", {"tokens": ["a"]}, "integer"),
        ("/detokenize", {"tokens": [-1]}, "greater than or equal to 0"),
        ("/detokenize", {"tokens": [5, FAR]}, "is no token id of this model"),
    ],
)
def test_bad_bodies_are_told_what_is_wrong(
    client: httpx.Client, path: str, body: dict[str, Any], said: str
) -> None:
    headers = {"Content-Type": "application/json"}
    answer = client.post(path, content=json.dumps(body), headers=headers)

    assert said in refused(answer)["message"]


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_an_unknown_model_is_named(client: httpx.Client, path: str) -> None:
    body = {"model": "nobody", "prompt": "a", "tokens": [5]}
    answer = client.post(path, json=body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_the_tokenizer_is_described_without_paths_of_the_server(
    client: httpx.Client, server: RunningServer
) -> None:
    answer = client.get("/tokenizer_info")
    tokenizer = server.services.engine.model.tokenizer

    info = answer.json()
    assert info["tokenizer_class"] == type(tokenizer).__name__
    assert info["eos_token"] == tokenizer.eos_token
    assert info["chat_template"] == tokenizer.chat_template
    assert str(server.model_folder) not in answer.text


def test_health_is_told_where_vllms_clients_look(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}


def test_embeddings_are_refused_with_the_reason(client: httpx.Client) -> None:
    error = refused(client.post("/v1/embeddings", json={"model": "tiny", "input": "a"}))

    assert error["code"] == "not_served"
    assert "generates text" in error["message"]
