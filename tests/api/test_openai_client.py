"""OpenAI's own Python client, unmodified, against a real server."""

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from openai import OpenAI

from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle

PROMPT = "The order arrived"


@pytest.fixture(scope="module")
def ai(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def base(server: RunningServer) -> str:
    return server.services.model_name


@pytest.fixture(scope="module")
def oracle(model_folder: Path) -> Oracle:
    return Oracle(model_folder)


@pytest.mark.client("openai", "models, listed and looked up")
def test_it_lists_and_finds_models(ai: OpenAI, base: str, adapter_folders: dict[str, Path]) -> None:
    names = [model.id for model in ai.models.list()]

    assert names[0] == base
    assert adapter_folders.keys() <= set(names)
    assert ai.models.retrieve(names[-1]).id == names[-1]
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("nobody")


@pytest.mark.client("openai", "completions, whole and streamed")
def test_it_completes_and_streams_the_same_text(ai: OpenAI, base: str, oracle: Oracle) -> None:
    whole = ai.completions.create(
        model=base, prompt=PROMPT, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    streamed = ai.completions.create(
        model=base,
        prompt=PROMPT,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, last = list(streamed)

    assert whole.choices[0].text == oracle.text(oracle.greedy(PROMPT, 12))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert last.usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12


@pytest.mark.client("openai", "chats with log-probabilities and several choices")
def test_it_chats_with_logprobs(ai: OpenAI, adapter_folders: dict[str, Path]) -> None:
    name = next(iter(adapter_folders))

    answer = ai.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": "Where is my order?"}],
        max_completion_tokens=8,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        n=2,
    )

    assert answer.system_fingerprint == f"{name}@1"
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        for token in choice.logprobs.content:
            assert token.logprob <= 0
            assert len(token.top_logprobs) == 2


@pytest.mark.client("openai", "chats, streamed, with usage")
def test_it_streams_a_chat(ai: OpenAI, base: str) -> None:
    messages = [{"role": "user", "content": "Where is my order?"}]
    whole = ai.chat.completions.create(
        model=base, messages=messages, max_tokens=12, seed=4, extra_body={"ignore_eos": True}
    )
    streamed = ai.chat.completions.create(
        model=base,
        messages=messages,
        max_tokens=12,
        seed=4,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    *chunks, last = list(streamed)

    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage) == ([], whole.usage)


def test_its_stream_helper_collects_the_answer(ai: OpenAI, base: str, oracle: Oracle) -> None:
    with ai.chat.completions.stream(
        model=base,
        messages=[{"role": "user", "content": "Where is my order?"}],
        logprobs=True,
        logit_bias={str(oracle.tokenizer.eos_token_id): 100},
        extra_body={"min_tokens": 5},
    ) as stream:
        final = stream.get_final_completion()

    [choice] = final.choices
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 6


def test_its_token_scores_have_the_expected_types(ai: OpenAI, base: str) -> None:
    answer = ai.completions.create(model=base, prompt=PROMPT, max_tokens=0, echo=True, logprobs=2)

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == list(PROMPT)
    assert logprobs.text_offset == list(range(len(PROMPT)))
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(PROMPT)


@pytest.mark.client("openai", "errors with `code` and `param`")
def test_its_errors_carry_ours(ai: OpenAI, base: str) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        ai.completions.create(model="nobody", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as bad:
        ai.completions.create(model=base, prompt=PROMPT, temperature=9)

    assert unknown.value.code == "model_not_found"
    assert bad.value.param == "temperature"


def test_several_prompts_come_back_in_order(ai: OpenAI, base: str, oracle: Oracle) -> None:
    prompts = ["one", "two"]

    answer = ai.completions.create(
        model=base, prompt=prompts, max_tokens=6, temperature=0, extra_body={"ignore_eos": True}
    )

    for choice, prompt in zip(answer.choices, prompts, strict=True):
        assert choice.text == oracle.text(oracle.greedy(prompt, 6))
