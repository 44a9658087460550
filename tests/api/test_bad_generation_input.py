"""Faulty generation requests: refused with the reason and the mend, and nothing is left behind."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS, at_rest, eventually

BOTH = [COMPLETIONS, CHAT]
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def base(server: RunningServer) -> str:
    return server.services.model_name


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(server: RunningServer) -> Any:
    yield
    assert eventually(lambda: at_rest(server))


def refused(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error of a refusal that has OpenAI's shape."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", True),
        ("temperature", "1"),
        ("top_p", -0.1),
        ("top_p", 1.5),
        ("min_p", -1),
        ("min_p", 2),
        ("top_k", -2),
        ("top_k", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", 1e9),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("n", 0),
        ("n", 10**9),
        ("n", True),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "many"),
        ("max_completion_tokens", -5),
        ("min_tokens", -1),
        ("min_tokens", 10**30),
        ("seed", 2**63),
        ("seed", 0.5),
        ("stop", ""),
        ("stop", ["a"] * 17),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [10**6]),
        ("stop_token_ids", ["a"]),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"-5": 1}),
        ("logit_bias", {"1000000": 1}),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"5": True}),
        ("logit_bias", [5]),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("priority", 2**40),
        ("model", ""),
        ("model", 5),
        ("model", None),
        ("composition", "product"),
        ("strength", 0),
    ],
)
def test_an_absurd_parameter_is_named(
    client: httpx.Client, base: str, path: str, field: str, value: object
) -> None:
    body = {"model": base, **PROMPTS[path], field: value}

    error = refused(client.post(path, json=body))

    assert str(error["param"]).startswith(field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["temperature", "top_p", "presence_penalty", "max_tokens"])
def test_numbers_that_are_none_are_refused(
    client: httpx.Client, base: str, field: str, number: str
) -> None:
    body = f'{{"model": "{base}", "prompt": "a", "{field}": {number}}}'

    refused(client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"}))


def test_a_bias_that_is_no_number_is_refused(client: httpx.Client, base: str) -> None:
    body = f'{{"model": "{base}", "prompt": "a", "logit_bias": {{"5": NaN}}}}'

    error = refused(
        client.post(COMPLETIONS, content=body, headers={"content-type": "application/json"})
    )

    assert error["param"] == "logit_bias"


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"model": ' + b"[" * 100_000,
        b'{"model": "x", "seed": ' + b"9" * 10_000 + b"}",
    ],
    ids=["nothing", "cut", "list", "text", "null", "no-utf8", "deep", "long-number"],
)
def test_a_body_that_is_no_json_object_is_refused(
    client: httpx.Client, path: str, body: bytes
) -> None:
    refused(client.post(path, content=body, headers={"content-type": "application/json"}))


def test_a_body_beyond_the_limit_is_refused(
    client: httpx.Client, base: str, server: RunningServer
) -> None:
    body = {"model": base, "prompt": "x" * (server.services.settings.max_body_bytes + 1)}

    refused(client.post(COMPLETIONS, json=body), status=413)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [""],
        [[]],
        ["text", ""],
        [[5], []],
        ["text", 5],
        [5, "text"],
        [5, True],
        [[5], "text"],
        [1.5],
        5,
        None,
        {"text": "a"},
    ],
    ids=repr,
)
def test_a_prompt_must_have_text_or_tokens(client: httpx.Client, base: str, prompt: object) -> None:
    error = refused(client.post(COMPLETIONS, json={"model": base, "prompt": prompt}))

    assert error["param"] == "prompt"


def test_half_characters_are_refused(client: httpx.Client, base: str) -> None:
    headers = {"content-type": "application/json"}
    prompt = f'{{"model": "{base}", "prompt": "a\\ud800"}}'
    content = f'{{"model": "{base}", "messages": [{{"role": "user", "content": "\\udc00"}}]}}'
    model = '{"model": "\\ud800", "prompt": "a"}'

    assert refused(client.post(COMPLETIONS, content=prompt, headers=headers))["param"] == "prompt"
    refused(client.post(CHAT, content=content, headers=headers))
    assert refused(client.post(COMPLETIONS, content=model, headers=headers))["param"] == "model"


@pytest.mark.parametrize("token", [-1, 261, 10**30])
def test_a_token_outside_of_the_vocabulary_is_named(
    client: httpx.Client, base: str, token: int
) -> None:
    alone = refused(client.post(COMPLETIONS, json={"model": base, "prompt": [5, token]}))
    among = refused(client.post(COMPLETIONS, json={"model": base, "prompt": [[5], [5, token]]}))

    assert "prompt[1] is" in alone["message"]
    assert "prompt[1][1] is" in among["message"]
    assert "0 to 260" in alone["message"]


@pytest.mark.parametrize("path", BOTH)
def test_prompt_and_limit_beyond_the_window_name_both_numbers(
    client: httpx.Client, base: str, server: RunningServer, path: str
) -> None:
    window = server.services.engine.model.max_model_len
    body = {"model": base, **PROMPTS[path], "max_tokens": window}

    error = refused(client.post(path, json=body))

    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "max_tokens"
    assert f"{window} tokens" in error["message"]
    assert f"max_tokens is {window}" in error["message"]


@pytest.mark.parametrize("tokens", ["window", "beyond", "far beyond"])
@pytest.mark.parametrize("limit", [None, 1])
def test_a_prompt_as_long_as_the_window_is_refused(
    client: httpx.Client, base: str, server: RunningServer, tokens: str, limit: int | None
) -> None:
    window = server.services.engine.model.max_model_len
    length = {"window": window, "beyond": window + 1, "far beyond": window * 1000}[tokens]
    body = {"model": base, "max_tokens": limit}

    prompt = refused(client.post(COMPLETIONS, json=body | {"prompt": "x" * length}))
    message = {"role": "user", "content": "x" * length}
    messages = refused(client.post(CHAT, json=body | {"messages": [message]}))

    assert prompt["code"] == messages["code"] == "context_length_exceeded"


def test_a_prompt_that_is_only_scored_may_fill_the_window(
    client: httpx.Client, base: str, server: RunningServer
) -> None:
    window = server.services.engine.model.max_model_len
    body = {"model": base, "prompt": "x" * window, "max_tokens": 0, "echo": True, "logprobs": 0}

    answer = client.post(COMPLETIONS, json=body)

    assert answer.status_code == 200
    assert len(answer.json()["choices"][0]["logprobs"]["tokens"]) == window


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("model", ["nobody", "../../etc/passwd", "a b", "ü", "x" * 1000])
def test_an_unknown_model_is_never_answered_by_the_base(
    client: httpx.Client, path: str, model: str
) -> None:
    error = refused(client.post(path, json={"model": model, **PROMPTS[path]}), status=404)

    assert error["code"] == "model_not_found"
    assert error["param"] == "model"
    assert "/v1/models" in error["message"]


@pytest.mark.parametrize("suffix", ["@99", "@0", "@-1", "@", "@latest", "@1@1"])
def test_an_unknown_revision_is_not_found(
    client: httpx.Client, adapter_folders: dict[str, Path], suffix: str
) -> None:
    body = {"model": next(iter(adapter_folders)) + suffix, "prompt": "a"}

    assert refused(client.post(COMPLETIONS, json=body), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", True),
        ("echo", "yes"),
        ("best_of", 2),
        ("suffix", "the end"),
    ],
)
def test_a_completions_own_parameters_are_checked(
    client: httpx.Client, base: str, field: str, value: object
) -> None:
    error = refused(client.post(COMPLETIONS, json={"model": base, "prompt": "a", field: value}))

    assert error["param"] == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", 3),
        ("top_logprobs", 3),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("functions", [{"name": "f"}]),
        ("response_format", "text"),
        ("chat_template_kwargs", {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}),
        ("chat_template_kwargs", {"tokenize": True}),
        ("chat_template_kwargs", [1]),
    ],
)
def test_a_chats_own_parameters_are_checked(
    client: httpx.Client, base: str, field: str, value: object
) -> None:
    error = refused(client.post(CHAT, json={"model": base, "messages": [USER], field: value}))

    assert error["param"] == field


def test_candidates_are_bounded(client: httpx.Client, base: str) -> None:
    body = {"model": base, "messages": [USER], "logprobs": True, "top_logprobs": 21}

    assert refused(client.post(CHAT, json=body))["param"] == "top_logprobs"


def test_an_answer_is_either_continued_or_opened(client: httpx.Client, base: str) -> None:
    body = {"model": base, "messages": [USER]}
    both = {"add_generation_prompt": True, "continue_final_message": True}

    assert refused(client.post(CHAT, json=body | both))["param"] == "continue_final_message"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "Hi",
        ["Hi"],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 5}],
        [{"role": "nobody", "content": "Hi"}],
        [{"content": "Hi"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["Hi"]}],
        [USER] * 5000,
    ],
    ids=lambda messages: repr(messages)[:60],
)
def test_messages_must_be_a_conversation_of_texts(
    client: httpx.Client, base: str, messages: object
) -> None:
    error = refused(client.post(CHAT, json={"model": base, "messages": messages}))

    assert str(error["param"]).startswith("messages")


@pytest.mark.parametrize("prompts", [1, 100])
def test_more_choices_than_the_queue_holds_are_refused(
    client: httpx.Client, base: str, server: RunningServer, prompts: int
) -> None:
    n = min(128, server.services.settings.max_queue // prompts + 1)
    body = {"model": base, "prompt": ["a"] * (prompts if n < 128 else 1000), "n": n}

    refused(client.post(COMPLETIONS, json=body))


def test_more_least_tokens_than_most_tokens_are_refused(client: httpx.Client, base: str) -> None:
    body = {"model": base, "prompt": "a", "max_tokens": 3, "min_tokens": 4}

    error = refused(client.post(COMPLETIONS, json=body))

    assert error["param"] == "min_tokens"


def test_a_refusal_does_not_disturb_running_requests(client: httpx.Client, base: str) -> None:
    body = {"model": base, "prompt": "a", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    undisturbed = client.post(COMPLETIONS, json=body).json()["choices"]

    with client.stream("POST", COMPLETIONS, json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        refused(client.post(COMPLETIONS, json=body | {"model": "nobody"}), 404)
        refused(client.post(COMPLETIONS, json=body | {"prompt": ""}))
        events = [line for line in lines if line.startswith("data: {")]

    assert events
    assert client.post(COMPLETIONS, json=body).json()["choices"] == undisturbed
