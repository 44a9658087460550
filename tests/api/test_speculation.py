"""`speculation` and OpenAI's `prediction`: the same answers, sooner."""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.test_chat import MESSAGES, chat

Test = TypeVar("Test", bound=Callable[..., None])
LOOP = [5, 9, 11] * 8


def drafting(test: Test) -> Test:
    """On vLLM neither field has an effect."""
    return pytest.mark.native(pytest.mark.usefixtures("free_tokens")(test))


@pytest.fixture(scope="module")
def base(server: RunningServer) -> str:
    return server.services.model_name


def counted(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    [value] = [each.split()[1] for each in lines if each.startswith("infuse_accepted_tokens_total")]
    return float(value)


@drafting
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_may_ask_for_it(client: httpx.Client, base: str, stream: bool) -> None:
    body = {"model": base, "prompt": LOOP, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    body |= {"logprobs": 1}
    plain = client.post("/v1/completions", json=body).json()["choices"][0]
    before = counted(client)
    body |= {"speculation": True, "stream": stream}
    answer = client.post("/v1/completions", json=body)
    assert counted(client) > before
    if not stream:
        assert answer.json()["choices"][0]["text"] == plain["text"]
        tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
    else:
        chunks = [c["choices"][0] for c in events(answer) if c["choices"]]
        assert "".join(chunk["text"] for chunk in chunks) == plain["text"]
        scored = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
        tokens = [token for each in scored for token in each["tokens"]]
        assert len(chunks) < 40
    assert tokens == plain["logprobs"]["tokens"]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


@drafting
@pytest.mark.parametrize("parts", [False, True])
def test_a_prediction_that_comes_true_is_accepted(
    client: httpx.Client, base: str, parts: bool
) -> None:
    """A bias lets the tiny model repeat itself, so that drafts are accepted."""
    body = {"ignore_eos": True, "max_tokens": 12, "logit_bias": {"70": 100}}
    plain = chat(client, base, **body)
    text = plain["choices"][0]["message"]["content"]
    content: Any = [{"type": "text", "text": text}] if parts else text
    answer = chat(client, base, **body, prediction={"type": "content", "content": content})

    assert answer["choices"] == plain["choices"]
    assert "completion_tokens_details" not in plain["usage"]
    assert answer["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": 12,
        "rejected_prediction_tokens": 0,
    }


@drafting
def test_each_choice_rejects_what_it_does_not_say(client: httpx.Client, base: str) -> None:
    prediction = {"type": "content", "content": "zyx"}
    body = {"messages": MESSAGES, "max_tokens": 4, "temperature": 0, "n": 2, "model": base}
    body |= {"logit_bias": {"70": 100}, "prediction": prediction, "stream": True}
    body |= {"stream_options": {"include_usage": True}}
    usage = events(client.post("/v1/chat/completions", json=body))[-1]["usage"]

    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 0,
        "rejected_prediction_tokens": 6,
    }


def test_an_empty_prediction_is_none(client: httpx.Client, base: str) -> None:
    answer = chat(client, base, prediction={"type": "content", "content": ""})
    assert "completion_tokens_details" not in answer["usage"]


@pytest.mark.parametrize(
    ("prediction", "field"),
    [
        ({"type": "image", "content": "a"}, "prediction.type"),
        ({"type": "content"}, "prediction.content"),
        ({"type": "content", "content": [{"type": "image_url"}]}, "prediction.content"),
        ("text", "prediction"),
    ],
    ids=str,
)
def test_what_is_no_prediction_is_refused(
    client: httpx.Client, base: str, prediction: Any, field: str
) -> None:
    body = {"messages": MESSAGES, "model": base, "prediction": prediction}
    response = client.post("/v1/chat/completions", json=body)

    assert response.status_code == 400
    assert response.json()["error"]["details"][0]["field"] == field
