"""Fields that vLLM added to OpenAI's, under its names and with its meanings."""

from typing import Any

import httpx
import pytest
from openai import OpenAI

from tests.api.conftest import RunningServer
from tests.api.test_bad_generation_input import refused
from tests.api.test_constraints import FORMAT, Order
from tests.api.test_streaming import CHAT, COMPLETIONS, PROMPTS, stream, text_of

BOTH = [COMPLETIONS, CHAT]
LETTER = {chr(byte): byte - 33 + 5 for byte in range(33, 127)}
"""The token of each letter."""


def ask(client: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    given = {"model": "tiny", **PROMPTS[path], "max_tokens": 12, "ignore_eos": True}
    response = client.post(path, json=given | body)
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    choice["said"] = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
    return choice


def likely(**letters: float) -> dict[str, Any]:
    return {"logit_bias": {str(LETTER[letter]): bias for letter, bias in letters.items()}}


@pytest.mark.parametrize("path", BOTH)
def test_no_stop_string_ends_an_answer_before_min_tokens(client: httpx.Client, path: str) -> None:
    body = {"stop": ["a"], "temperature": 0, **likely(a=100)}

    assert ask(client, path, **body)["said"] == ""
    late = ask(client, path, **body, min_tokens=5)
    streamed = stream(client, path, model="tiny", **PROMPTS[path], **body, min_tokens=5)

    assert (late["said"], late["finish_reason"]) == ("aaaaa", "stop")
    assert "".join(text_of(c) for chunk in streamed for c in chunk["choices"]) == "aaaaa"


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("body", "said", "reason"),
    [
        ({"stop": ["x", "aa"]}, "", "aa"),
        ({"stop": ["aaa"], "include_stop_str_in_output": True}, "aaa", "aaa"),
        ({"stop_token_ids": [LETTER["a"]]}, "", LETTER["a"]),
        ({"stop_token_ids": [LETTER["a"]], "include_stop_str_in_output": True}, "a", LETTER["a"]),
        ({"stop": ["x"]}, "a" * 12, None),
        ({"ignore_eos": False, "logit_bias": {"2": 100}}, "", None),
    ],
)
def test_what_stopped_an_answer_is_said_and_may_be_kept(
    client: httpx.Client, path: str, body: dict[str, Any], said: str, reason: object
) -> None:
    body = {"temperature": 0, **likely(a=100)} | body
    choice = ask(client, path, **body)
    given = {"model": "tiny", **PROMPTS[path], "max_tokens": 12, "ignore_eos": True} | body
    *before, last = [chunk["choices"][0] for chunk in stream(client, path, **given)]

    assert (choice["said"], choice["stop_reason"]) == (said, reason)
    assert last["stop_reason"] == reason
    assert all("stop_reason" not in each for each in before)


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize("temperature", [0, 1])
def test_only_allowed_tokens_come(client: httpx.Client, path: str, temperature: float) -> None:
    allowed = [LETTER["a"], LETTER["b"]]
    choice = ask(client, path, allowed_token_ids=allowed, temperature=temperature)

    assert len(choice["said"]) == 12
    assert set(choice["said"]) <= {"a", "b"}


@pytest.mark.parametrize("path", BOTH)
def test_bad_words_never_come(client: httpx.Client, path: str) -> None:
    body = {"temperature": 0, **likely(a=90, b=50)}

    assert ask(client, path, **body)["said"] == "a" * 12
    assert ask(client, path, **body, bad_words=["a"])["said"] == "b" * 12
    assert ask(client, path, **body, bad_words=["aa", "bb"])["said"] == "ab" * 6
    assert ask(client, path, **body, bad_words=[])["said"] == "a" * 12


def test_a_prompt_is_truncated_at_either_side(client: httpx.Client, server: RunningServer) -> None:
    def echoed(prompt: object, **body: Any) -> tuple[str, int]:
        given = {"model": "tiny", "prompt": prompt, "echo": True, "max_tokens": 1} | body
        answer = client.post(COMPLETIONS, json=given | {**likely(a=100), "temperature": 0}).json()
        return answer["choices"][0]["text"], answer["usage"]["prompt_tokens"]

    assert echoed("bcdef", truncate_prompt_tokens=3) == ("defa", 3)
    assert echoed("bcdef", truncate_prompt_tokens=3, truncation_side="right") == ("bcda", 3)
    assert echoed("bcdef", truncate_prompt_tokens=9) == ("bcdefa", 5)
    window = server.services.engine.model.max_model_len
    assert echoed("b" * 2 * window, truncate_prompt_tokens=-1)[1] == window - 1
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "b" * 2 * window}]}
    answer = client.post(CHAT, json=chat | {"truncate_prompt_tokens": -1, "max_tokens": 5}).json()
    assert answer["usage"]["prompt_tokens"] == window - 5


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("min_tokens", 99, "raise max_tokens"),
        ("allowed_token_ids", [], "at least 1"),
        ("allowed_token_ids", [999], "from 0 to 260"),
        ("allowed_token_ids", "a", "list"),
        ("allowed_token_ids", [99] * 262, "has only 261"),
        ("bad_words", ["a", ""], "at least 1"),
        ("bad_words", "a", "list"),
        ("truncate_prompt_tokens", 0, "at least 1"),
        ("truncate_prompt_tokens", -2, "greater than or equal to -1"),
        ("truncation_side", "middle", "left"),
        ("include_stop_str_in_output", "yes", "boolean"),
        ("add_special_tokens", 1, "boolean"),
        ("guided_choice", [], "at least 1"),
        ("guided_regex", "(", "unclosed"),
        ("guided_json", "{", "no JSON"),
    ],
)
def test_bad_values_are_named(
    client: httpx.Client, path: str, field: str, value: object, said: str
) -> None:
    body = {"model": "tiny", **PROMPTS[path], "max_tokens": 9, field: value}
    error = refused(client.post(path, json=body))

    assert str(error["param"]).startswith(field)
    assert said in error["message"]


def test_an_allowance_that_leaves_nothing_is_refused(client: httpx.Client) -> None:
    body = {"model": "tiny", "prompt": "a", "allowed_token_ids": [2], "min_tokens": 1}
    words = {"model": "tiny", "prompt": "a", "allowed_token_ids": [LETTER["a"]], "bad_words": ["a"]}
    held = {"model": "tiny", "prompt": "a", "allowed_token_ids": [2], "guided_regex": "a"}

    for each in (body, words, held):
        assert refused(client.post(COMPLETIONS, json=each))["param"] == "allowed_token_ids"


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    "constraint",
    [
        {"guided_json": Order.model_json_schema()},
        {"response_format": FORMAT},
        {"response_format": {"type": "json_object", "schema": Order.model_json_schema()}},
        {"response_format": {"type": "json_object", "value": Order.model_json_schema()}},
        {"response_format": {"type": "json", "value": Order.model_json_schema()}},
        {
            "structured_outputs": {
                "json": Order.model_json_schema(),
                "regex": None,
                "choice": None,
                "json_object": None,
                "disable_any_whitespace": False,
                "structural_tag": None,
            }
        },
    ],
    ids=lambda constraint: str(constraint)[:50],
)
def test_every_way_to_ask_for_a_schema_is_served(
    client: httpx.Client, path: str, constraint: dict[str, Any]
) -> None:
    choice = ask(client, path, **constraint, max_tokens=150, seed=3, ignore_eos=False)

    Order.model_validate_json(choice["said"])


@pytest.mark.parametrize("path", BOTH)
def test_vllms_older_constraints_are_served(client: httpx.Client, path: str) -> None:
    free = {"max_tokens": 50, "ignore_eos": False}

    assert ask(client, path, guided_choice=["yes", "no"], **free)["said"] in ("yes", "no")
    assert ask(client, path, guided_regex="[ab]{3}c", **free)["said"][3:] == "c"
    assert ask(client, path, guided_grammar='root ::= "a" "b"', **free)["said"] == "ab"
    brace = likely(**{"}": 100})
    for any_object in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        assert ask(client, path, **any_object, **brace, **free)["said"].startswith("{")


@pytest.mark.parametrize("path", BOTH)
def test_two_constraints_exclude_each_other(client: httpx.Client, path: str) -> None:
    body = {"model": "tiny", **PROMPTS[path], "guided_regex": "a"}

    for other in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"guided_choice": ["a"]},
    ):
        error = refused(client.post(path, json=body | other))
        assert "exclude each other" in error["message"]


@pytest.mark.parametrize("path", BOTH)
def test_usage_is_null_or_counted_in_every_chunk(client: httpx.Client, path: str) -> None:
    body = {"model": "tiny", **PROMPTS[path], "max_tokens": 6, "ignore_eos": True}
    options = {"include_usage": True}

    *chunks, last = stream(client, path, **body, stream_options=options)
    counted = stream(
        client, path, **body, stream_options=options | {"continuous_usage_stats": True}
    )

    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["usage"]["completion_tokens"] == 6
    counts = [chunk["usage"]["completion_tokens"] for chunk in counted]
    assert counts == sorted(counts)
    assert counts[-1] == 6
    assert {chunk["usage"]["prompt_tokens"] for chunk in counted} == {
        last["usage"]["prompt_tokens"]
    }
    plain = stream(client, path, **body, stream_options={"include_usage": None})
    assert all("usage" not in chunk for chunk in plain)


def test_openais_client_reads_all_of_it(server: RunningServer) -> None:
    with OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as ai:
        more = {"include_stop_str_in_output": True, "min_tokens": 3, "bad_words": ["b"]}
        answer = ai.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            stop="a",
            top_p=0,
            extra_body=more,
            **likely(a=100),
        )

    [choice] = answer.choices
    assert choice.message.content == "aaaa"
    assert choice.to_dict()["stop_reason"] == "a"


@pytest.mark.parametrize("path", BOTH)
@pytest.mark.parametrize(
    ("asked", "same"),
    [
        ({"top_p": 0}, {"temperature": 0}),
        ({"temperature": 1e-6}, {"temperature": 0}),
        ({"top_k": 0, "seed": 1}, {"top_k": -1, "seed": 1}),
        ({"min_p": 0, "seed": 1}, {"seed": 1}),
        ({"min_p": 1, "seed": 1}, {"temperature": 0}),
        ({"stop": [], "seed": 1}, {"stop": None, "seed": 1}),
        ({"n": None, "logit_bias": {}, "seed": 1}, {"seed": 1}),
    ],
)
def test_edges_of_a_parameter_mean_what_they_mean_elsewhere(
    client: httpx.Client, path: str, asked: dict[str, Any], same: dict[str, Any]
) -> None:
    assert ask(client, path, **asked)["said"] == ask(client, path, **same)["said"]


def test_no_candidates_may_be_asked_for_without_logprobs(client: httpx.Client) -> None:
    assert ask(client, CHAT, top_logprobs=0)["logprobs"] is None
    assert ask(client, CHAT, top_logprobs=0, logprobs=False)["logprobs"] is None
    assert ask(client, COMPLETIONS, logprobs=0)["logprobs"]["top_logprobs"]
