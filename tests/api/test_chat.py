"""`POST /v1/chat/completions` on a real server."""

from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Where is my order?"},
]


def chat(client: httpx.Client, model: str, **body: Any) -> dict[str, Any]:
    body = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12, **body, "model": model}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def base(server: RunningServer) -> str:
    return server.services.model_name


@pytest.fixture(scope="module")
def oracle(model_folder: Path) -> Oracle:
    return Oracle(model_folder)


def rendered(oracle: Oracle, messages: list[dict[str, str]] = MESSAGES, **how: Any) -> list[int]:
    how = {"add_generation_prompt": True} | how
    ids = oracle.tokenizer.apply_chat_template(messages, return_dict=False, **how)
    return list(ids)


def test_base_and_adapter_answer_as_peft_does(
    client: httpx.Client, base: str, model_folder: Path, adapter_folders: dict[str, Path]
) -> None:
    oracles = {base: Oracle(model_folder)}
    oracles |= {name: Oracle(model_folder, folder) for name, folder in adapter_folders.items()}

    for model, oracle in oracles.items():
        answer = chat(client, model, ignore_eos=True)
        expected = oracle.greedy(rendered(oracle), 12)
        assert answer["choices"][0]["message"]["content"] == oracle.text(expected)


def test_an_answer_has_openais_shape(client: httpx.Client, base: str, oracle: Oracle) -> None:
    answer = chat(client, base, ignore_eos=True)

    prompt_tokens = len(rendered(oracle))
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    assert (answer["model"], answer["system_fingerprint"]) == (base, base)
    cached = answer["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= cached < prompt_tokens
    assert answer["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 12,
        "total_tokens": prompt_tokens + 12,
    }
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "message", "logprobs", "finish_reason", "stop_reason"}
    assert choice["message"].keys() == {"role", "content"}
    assert choice["message"]["role"] == "assistant"
    assert (choice["logprobs"], choice["finish_reason"]) == (None, "length")


def test_the_answering_revision_is_named(
    client: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    name = next(iter(adapter_folders))

    response = client.post(
        "/v1/chat/completions", json={"model": name, "messages": MESSAGES, "max_tokens": 1}
    )

    assert response.headers["infuse-adapter"] == f"{name}@1"
    assert response.json()["system_fingerprint"] == f"{name}@1"


def test_an_answer_may_fill_the_window(
    client: httpx.Client, base: str, server: RunningServer
) -> None:
    answer = chat(client, base, max_tokens=None, ignore_eos=True)

    assert answer["usage"]["total_tokens"] == server.services.engine.model.max_model_len
    assert answer["choices"][0]["finish_reason"] == "length"


def test_the_newer_name_of_the_limit_wins(client: httpx.Client, base: str) -> None:
    answer = chat(client, base, max_completion_tokens=3, ignore_eos=True)

    assert answer["usage"]["completion_tokens"] == 3


def test_text_parts_are_one_text(client: httpx.Client, base: str) -> None:
    parts = [{"type": "text", "text": "Where is"}, {"type": "text", "text": "my order?"}]

    in_parts = chat(client, base, messages=[{"role": "user", "content": parts}])
    in_one = chat(client, base, messages=[{"role": "user", "content": "Where is\nmy order?"}])

    assert in_parts["choices"] == in_one["choices"]


def test_developer_is_another_word_for_system(client: httpx.Client, base: str) -> None:
    renamed = [MESSAGES[0] | {"role": "developer"}, MESSAGES[1]]

    assert chat(client, base, messages=renamed)["choices"] == chat(client, base)["choices"]


def test_a_begun_answer_is_continued(client: httpx.Client, base: str, oracle: Oracle) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "It is on"}]

    answer = chat(client, base, messages=begun, continue_final_message=True, ignore_eos=True)

    prompt = rendered(oracle, begun, add_generation_prompt=False, continue_final_message=True)
    assert answer["choices"][0]["message"]["content"] == oracle.text(oracle.greedy(prompt, 12))


def test_an_answer_is_opened_unless_refused(
    client: httpx.Client, base: str, oracle: Oracle
) -> None:
    opened = chat(client, base)["usage"]["prompt_tokens"]
    bare = chat(client, base, add_generation_prompt=False)["usage"]["prompt_tokens"]

    assert bare == opened - 1 == len(rendered(oracle, add_generation_prompt=False))


def test_several_seeded_choices_are_repeatable(client: httpx.Client, base: str) -> None:
    first = chat(client, base, n=3, seed=5, temperature=1)
    again = chat(client, base, n=3, seed=5, temperature=1)

    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert again["choices"] == first["choices"]


def test_logprobs_carry_the_tokens_bytes(client: httpx.Client, base: str, oracle: Oracle) -> None:
    answer = chat(client, base, logprobs=True, top_logprobs=2, ignore_eos=True)

    prompt = rendered(oracle)
    generated = oracle.greedy(prompt, 12)
    scores = oracle.scores(prompt + generated)[len(prompt) - 1 : -1]
    expected = scores[torch.arange(12), torch.tensor(generated)]
    content = answer["choices"][0]["logprobs"]["content"]
    assert [token["logprob"] for token in content] == pytest.approx(expected.tolist(), abs=1e-4)
    for token, row in zip(content, scores, strict=True):
        top = [candidate["logprob"] for candidate in token["top_logprobs"]]
        assert top == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
        assert bytes(token["bytes"]).decode(errors="replace") == token["token"]
        assert token["top_logprobs"][0]["token"] == token["token"]


def test_logprobs_need_no_candidates(client: httpx.Client, base: str) -> None:
    answer = chat(client, base, logprobs=True, max_tokens=2, ignore_eos=True)

    content = answer["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in content] == [[], []]


def test_neutral_fields_are_ignored(client: httpx.Client, base: str) -> None:
    answer = chat(
        client, base, tools=[], response_format={"type": "text"}, metadata={"a": "b"}, store=False
    )

    assert answer["choices"] == chat(client, base)["choices"]
