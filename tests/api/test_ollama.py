"""Ollama's API: the answers of chat completions, in another shape, and adapters as its models."""

import json
from typing import Any

import httpx
import pytest

from infuse.server.api.other_servers import NOT_SERVED
from tests.api.conftest import RunningServer
from tests.api.test_messages import JSON, answered, in_chat
from tests.api.test_streaming import at_rest, eventually

ASK, GENERATE = "/api/chat", "/api/generate"
ASKED: list[Any] = [{"role": "user", "content": "Where is my order?"}]
OPTIONS = {"num_predict": 12, "temperature": 0}
BODY: dict[str, Any] = {"model": "tiny", "messages": ASKED, "options": OPTIONS}
WHOLE = BODY | {"stream": False}


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server: RunningServer) -> Any:
    yield
    assert eventually(lambda: at_rest(server))


def refused(response: httpx.Response, status: int = 400) -> str:
    """The message of a refusal that has Ollama's form."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    return str(response.json()["error"])


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


@pytest.mark.parametrize("model", ["tiny", "default", "mlp@1"])
def test_an_answer_is_that_of_chat_completions(client: httpx.Client, model: str) -> None:
    answer = answered(client.post(ASK, json=WHOLE | {"model": model}))
    text = {"model": model, "prompt": ASKED[0]["content"], "options": OPTIONS, "stream": False}
    generated = answered(client.post(GENERATE, json=text))
    chat = in_chat(client, ASKED, model=model)
    [choice] = chat["choices"]

    assert answer["message"] == choice["message"]
    assert generated["response"] == choice["message"]["content"]
    for each in (answer, generated):
        assert (each["model"], each["done"]) == (model, True)
        assert each["done_reason"] == choice["finish_reason"]
        assert each["prompt_eval_count"] == chat["usage"]["prompt_tokens"]
        assert each["eval_count"] == chat["usage"]["completion_tokens"]
        parts = [each[f"{part}_duration"] for part in ("load", "prompt_eval", "eval")]
        assert min(parts) > 0
        assert sum(parts) <= each["total_duration"] + 3


@pytest.mark.parametrize("path", [ASK, GENERATE])
def test_it_streams_lines_unless_told_otherwise(client: httpx.Client, path: str) -> None:
    body = BODY | {"prompt": ASKED[0]["content"]}
    del body["prompt" if path == ASK else "messages"]
    whole = answered(client.post(path, json=body | {"stream": False}))
    *chunks, last = lines(client.post(path, json=body))

    def said(chunk: dict[str, Any]) -> str:
        return str(chunk["message"]["content"] if path == ASK else chunk["response"])

    assert len(chunks) > 1
    assert "".join(map(said, chunks)) == said(whole)
    assert said(last) == ""
    assert [chunk["done"] for chunk in (*chunks, last)] == [False] * len(chunks) + [True]
    assert last.keys() == whole.keys()
    assert last["eval_count"] == whole["eval_count"]


def test_a_system_prompt_is_the_first_message(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "Hi", "system": "Be brief.", "options": OPTIONS}
    answer = answered(client.post(GENERATE, json=body | {"stream": False}))
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]

    assert answer["response"] == in_chat(client, said)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({"seed": 7, "temperature": 1.5}, {"seed": 7, "temperature": 1.5}),
        ({"seed": 7, "top_k": 3, "temperature": 1}, {"seed": 7, "top_k": 3, "temperature": 1}),
        ({"seed": 7, "top_p": 0.3, "temperature": 1}, {"seed": 7, "top_p": 0.3, "temperature": 1}),
        ({"repeat_penalty": 5}, {"repetition_penalty": 5}),
        ({"presence_penalty": 2}, {"presence_penalty": 2}),
        ({"stop": ["\\u0006", "$"]}, {"stop": ["\\u0006", "$"]}),
        ({"num_predict": 3}, {"max_tokens": 3}),
        ({"num_ctx": 4096, "num_gpu": 1, "mirostat": 0, "typical_p": 1.0}, {}),
    ],
    ids=str,
)
def test_options_mean_what_they_mean_in_chat_completions(
    client: httpx.Client, options: dict[str, Any], same: dict[str, Any]
) -> None:
    answer = answered(client.post(ASK, json=WHOLE | {"options": OPTIONS | options}))

    assert answer["message"] == in_chat(client, ASKED, **same)["choices"][0]["message"]


@pytest.mark.parametrize("format", [{"enum": ["yes", "no"]}, "json"])
def test_an_answer_is_held_to_a_format(client: httpx.Client, format: Any) -> None:
    options = {"num_predict": 100, "temperature": 0}
    answer = answered(client.post(ASK, json=WHOLE | {"format": format, "options": options}))

    text = answer["message"]["content"]
    assert text.startswith("{") if format == "json" else json.loads(text) in ("yes", "no")


@pytest.mark.parametrize("path", [ASK, GENERATE])
def test_a_request_without_a_text_finds_the_model_loaded(client: httpx.Client, path: str) -> None:
    answer = answered(client.post(path, json={"model": "mlp", "keep_alive": "5m"}))

    assert (answer["model"], answer["done"], answer["done_reason"]) == ("mlp", True, "load")
    assert "no model 'x'" in refused(client.post(path, json={"model": "x"}), 404)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": None}, "model"),
        ({"messages": [{"role": "robot"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}]}, "images is not"),
        ({"options": {"mirostat": 2}}, "options: mirostat is not served"),
        ({"options": {"repeat_last_n": 64}}, "options: repeat_last_n is not served"),
        ({"options": {"temperature": -1}}, "options.temperature"),
        ({"options": {"num_predict": 0}}, "max_tokens must be at least 1"),
        ({"think": True}, "think: is not served here"),
        ({"think": "high"}, "think: is not served here"),
        ({"raw": True}, "raw is not served here"),
        ({"template": "{{ .Prompt }}"}, "template is not served here"),
        ({"max_tokens": 3}, "'options'"),
        ({"lora_path": "x"}, "as 'model'"),
        ({"format": {"not": {}}}, "not"),
        ({"temperature": 1, "options": {"top_p": 2}}, "options.top_p"),
    ],
    ids=str,
)
def test_what_is_not_served_is_refused_with_its_name(
    client: httpx.Client, changed: dict[str, Any], said: str
) -> None:
    assert said in refused(client.post(ASK, json=WHOLE | changed))


def test_errors_have_ollamas_form_wherever_they_arise(
    client: httpx.Client, server: RunningServer
) -> None:
    assert "no valid JSON" in refused(client.post(ASK, content=b"{", headers=JSON))
    too_long = b" " * (server.services.settings.max_body_bytes + 1)
    assert "limit" in refused(client.post(ASK, content=too_long, headers=JSON), 413)
    assert "nothing at" in refused(client.get("/api/nothing"), 404)


def test_adapters_are_listed_as_models(
    client: httpx.Client, adapter_folders: dict[str, Any]
) -> None:
    base, *adapters = answered(client.get("/api/tags"))["models"]

    assert (base["name"], base["details"]["parent_model"]) == ("tiny", "")
    assert adapter_folders.keys() <= {each["name"] for each in adapters}
    for each in adapters:
        assert each["model"] == each["name"]
        assert each["details"]["parent_model"] == "tiny"
        assert (len(each["digest"]), each["size"] > 0) == (64, True)


def test_what_has_answered_is_loaded(client: httpx.Client) -> None:
    answered(client.post(ASK, json=WHOLE | {"model": "queries"}))
    base, *adapters = answered(client.get("/api/ps"))["models"]

    assert base["name"] == "tiny"
    assert "queries@1" in [each["name"] for each in adapters]
    assert all(each["context_length"] > 0 for each in (base, *adapters))


def test_a_model_is_shown_with_what_it_can(client: httpx.Client, url_with_tools: str) -> None:
    shown = answered(client.post("/api/show", json={"model": "mlp"}))
    with_tools = answered(httpx.post(f"{url_with_tools}/api/show", json={"model": "tiny"}))

    assert shown["modelfile"] == "FROM tiny\nADAPTER mlp@1\n"
    assert shown["details"]["parent_model"] == "tiny"
    assert shown["model_info"]["infuse.context_length"] > 0
    assert shown["capabilities"] == ["completion"]
    assert with_tools["capabilities"] == ["completion", "tools"]
    assert "no model 'x'" in refused(client.post("/api/show", json={"model": "x"}), 404)


@pytest.mark.parametrize("route", NOT_SERVED, ids=" ".join)
def test_routes_of_other_servers_name_the_way_that_does_the_same(
    client: httpx.Client, route: tuple[str, str]
) -> None:
    method, path = route
    answer = client.request(method, path.replace("{digest}", "sha256:1"), content=b"{")

    assert answer.status_code == 400
    error = answer.json()["error"]
    message = error if path.startswith("/api/") else error["message"]
    assert "is not served here: " in message
    assert NOT_SERVED[route] in message
    assert "lora" not in path or "PUT /v1/adapters/{name}" in message
