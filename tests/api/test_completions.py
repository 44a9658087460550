"""`POST /v1/completions` on a real server."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle

PROMPT = "The order arrived"


def complete(client: httpx.Client, model: str, **body: Any) -> dict[str, Any]:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, **body, "model": model}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@pytest.fixture(scope="module")
def base(server: RunningServer) -> str:
    return server.services.model_name


@pytest.fixture(scope="module")
def oracle(model_folder: Path) -> Oracle:
    return Oracle(model_folder)


def test_base_and_adapters_in_one_batch_equal_peft(
    client: httpx.Client,
    server: RunningServer,
    model_folder: Path,
    adapter_folders: dict[str, Path],
) -> None:
    prompts = [f"{PROMPT} on day {day}" for day in range(4)]
    oracles = {server.services.model_name: Oracle(model_folder)}
    oracles |= {name: Oracle(model_folder, folder) for name, folder in adapter_folders.items()}
    asked = [(name, prompt) for prompt in prompts for name in oracles]

    def ask(model: str, prompt: str) -> dict[str, Any]:
        return complete(client, model, prompt=prompt, logprobs=0, ignore_eos=True)

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda pair: ask(*pair), asked))

    for (model, prompt), answer in zip(asked, answers, strict=True):
        oracle = oracles[model]
        expected = oracle.greedy(prompt, 12)
        choice = answer["choices"][0]
        assert choice["logprobs"]["tokens"] == oracle.names(expected), (model, prompt)
        assert choice["text"] == oracle.text(expected)
    assert len({answer["choices"][0]["text"] for answer in answers[: len(oracles)]}) > 1


def test_an_answer_has_openais_shape(client: httpx.Client, base: str) -> None:
    answer = complete(client, base, ignore_eos=True)

    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == base
    assert isinstance(answer["created"], int)
    cached = answer["usage"].pop("prompt_tokens_details")["cached_tokens"]
    assert 0 <= cached < len(PROMPT)
    assert answer["usage"] == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 12,
        "total_tokens": len(PROMPT) + 12,
    }
    [choice] = answer["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert (choice["index"], choice["logprobs"]) == (0, None)
    assert choice["finish_reason"] == "length"


def test_the_answering_revision_is_named(
    client: httpx.Client, base: str, adapter_folders: dict[str, Path]
) -> None:
    name = next(iter(adapter_folders))
    body = {"model": name, "prompt": PROMPT, "max_tokens": 1}

    current = client.post("/v1/completions", json=body)
    pinned = client.post("/v1/completions", json=body | {"model": f"{name}@1"})
    plain = client.post("/v1/completions", json=body | {"model": base})

    assert current.headers["infuse-adapter"] == f"{name}@1"
    assert current.json()["system_fingerprint"] == f"{name}@1"
    assert current.json()["model"] == name
    assert pinned.headers["infuse-adapter"] == f"{name}@1"
    assert "infuse-adapter" not in plain.headers
    assert plain.json()["system_fingerprint"] == base


def test_a_prompt_of_token_ids_is_the_same_prompt(
    client: httpx.Client, base: str, oracle: Oracle
) -> None:
    as_text = complete(client, base)
    as_ids = complete(client, base, prompt=oracle.ids(PROMPT))

    assert as_ids["choices"] == as_text["choices"]
    assert as_ids["usage"] == as_text["usage"]


@pytest.mark.parametrize("as_ids", [False, True])
def test_choices_are_numbered_prompt_by_prompt(
    client: httpx.Client, base: str, oracle: Oracle, as_ids: bool
) -> None:
    prompts = ["one", "two", "three"]
    body: dict[str, Any] = {"prompt": [oracle.ids(p) for p in prompts] if as_ids else prompts}

    answer = complete(client, base, n=2, logprobs=0, ignore_eos=True, **body)

    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    for choice in answer["choices"]:
        expected = oracle.names(oracle.greedy(prompts[choice["index"] // 2], 12))
        assert choice["logprobs"]["tokens"] == expected
    assert answer["usage"]["prompt_tokens"] == len("onetwothree")
    assert answer["usage"]["completion_tokens"] == 6 * 12


def test_prompts_that_begin_alike_are_scored_like_any(
    client: httpx.Client, base: str, oracle: Oracle
) -> None:
    prompts = [f"The order that we had waited for arrived {how}." for how in ("late", "in time")]

    answer = complete(client, base, prompt=prompts, n=2, echo=True, logprobs=0, max_tokens=0)

    for choice in answer["choices"]:
        ids = oracle.ids(prompts[choice["index"] // 2])
        scores = oracle.scores(ids)
        first, *found = choice["logprobs"]["token_logprobs"]
        assert first is None
        wanted = [scores[place, token].item() for place, token in enumerate(ids[1:])]
        assert found == pytest.approx(wanted, abs=1e-3)


def test_a_seed_makes_each_choice_repeatable(client: httpx.Client, base: str) -> None:
    def texts(**body: Any) -> list[str]:
        answer = complete(client, base, temperature=1, **body)
        return [choice["text"] for choice in answer["choices"]]

    together = texts(n=3, seed=11)

    assert texts(n=3, seed=11) == together
    assert len(set(together)) == 3
    assert [texts(seed=11 + choice)[0] for choice in range(3)] == together
    assert texts(seed=-1) == texts(seed=-1) != texts(seed=1)


def test_a_stop_string_ends_the_text_before_it(client: httpx.Client, base: str) -> None:
    text = complete(client, base, ignore_eos=True)["choices"][0]["text"]
    stop = next(letter for letter in text[2:] if letter.isascii())

    [choice] = complete(client, base, ignore_eos=True, stop=stop)["choices"]
    [also] = complete(client, base, ignore_eos=True, stop=["never comes", stop])["choices"]

    assert choice["text"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert also == choice


def test_a_stop_token_ends_the_text(client: httpx.Client, base: str, oracle: Oracle) -> None:
    expected = oracle.greedy(PROMPT, 12)
    last = expected[4]

    answer = complete(client, base, ignore_eos=True, stop_token_ids=[last])

    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == expected.index(last) + 1


def test_an_end_token_ends_the_text_unless_it_is_ignored(
    client: httpx.Client, base: str, oracle: Oracle
) -> None:
    end = {str(oracle.tokenizer.eos_token_id): 100}

    stopped = complete(client, base, logit_bias=end)
    later = complete(client, base, logit_bias=end, min_tokens=5)
    ignored = complete(client, base, logit_bias=end, ignore_eos=True)

    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["text"] == ""
    assert stopped["usage"]["completion_tokens"] == 1
    assert later["usage"]["completion_tokens"] == 6
    assert ignored["choices"][0]["finish_reason"] == "length"
    assert ignored["usage"]["completion_tokens"] == 12


def test_special_tokens_are_shown_on_demand(
    client: httpx.Client, base: str, oracle: Oracle
) -> None:
    end = {str(oracle.tokenizer.eos_token_id): 100}

    answer = complete(
        client, base, logit_bias=end, ignore_eos=True, max_tokens=2, skip_special_tokens=False
    )

    assert answer["choices"][0]["text"] == "</s></s>"


def test_sixteen_tokens_come_without_a_limit(client: httpx.Client, base: str) -> None:
    body = {"model": base, "prompt": PROMPT, "ignore_eos": True}

    usage = client.post("/v1/completions", json=body).json()["usage"]

    assert usage["completion_tokens"] == 16


def test_the_default_limit_is_cut_to_the_window(
    client: httpx.Client, base: str, server: RunningServer
) -> None:
    window = server.services.engine.model.max_model_len
    body = {"model": base, "prompt": "x" * (window - 3), "ignore_eos": True}

    answer = client.post("/v1/completions", json=body).json()

    assert answer["usage"]["total_tokens"] == window
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("adapted", [False, True])
def test_logprobs_are_the_models_own(
    client: httpx.Client,
    base: str,
    adapted: bool,
    model_folder: Path,
    adapter_folders: dict[str, Path],
) -> None:
    name = next(iter(adapter_folders))
    oracle = Oracle(model_folder, adapter_folders[name] if adapted else None)
    model = name if adapted else base

    answer = complete(client, model, logprobs=3, ignore_eos=True, temperature=0)

    written = answer["choices"][0]["logprobs"]
    generated = oracle.greedy(PROMPT, 12)
    scores = oracle.scores(oracle.ids(PROMPT) + generated)[len(PROMPT) - 1 : -1]
    expected = scores[torch.arange(12), torch.tensor(generated)]
    assert written["token_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
    for row, top in zip(scores, written["top_logprobs"], strict=True):
        values, tokens = row.topk(3)
        best = dict(zip(oracle.names(tokens.tolist()), values.tolist(), strict=True))
        assert top == pytest.approx(best, abs=1e-4)


def test_logprobs_come_before_temperature_and_bias(client: httpx.Client, base: str) -> None:
    plain = complete(client, base, logprobs=1, max_tokens=1)
    warm = complete(client, base, logprobs=1, max_tokens=1, temperature=2, seed=1, top_k=1)

    assert warm["choices"][0]["logprobs"] == plain["choices"][0]["logprobs"]


def test_an_echoed_prompt_is_scored_without_generating(
    client: httpx.Client, base: str, oracle: Oracle
) -> None:
    answer = complete(client, base, echo=True, logprobs=1, max_tokens=0)

    [choice] = answer["choices"]
    ids = oracle.ids(PROMPT)
    written = choice["logprobs"]
    expected = oracle.scores(ids)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    assert choice["text"] == PROMPT
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert written["tokens"] == list(PROMPT)
    assert written["token_logprobs"][0] is None
    assert written["top_logprobs"][0] is None
    assert written["token_logprobs"][1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert written["text_offset"] == list(range(len(PROMPT)))


def test_an_evaluation_harness_gets_the_scores_of_a_continuation(
    client: httpx.Client, base: str, oracle: Oracle
) -> None:
    """What lm-eval's `local-completions` sends: context and continuation echoed, one token more."""
    context, continuation = oracle.ids("The capital is"), oracle.ids(" Paris")
    ids = context + continuation

    answer = complete(client, base, prompt=[ids], echo=True, logprobs=1, max_tokens=1)

    written = answer["choices"][0]["logprobs"]
    scores = oracle.scores(ids)[len(context) - 1 : -1]
    expected = scores[torch.arange(len(continuation)), torch.tensor(continuation)]
    of_continuation = slice(len(context), -1)
    assert written["token_logprobs"][of_continuation] == pytest.approx(expected.tolist(), abs=1e-4)
    best = [max(top.values()) for top in written["top_logprobs"][of_continuation]]
    assert best == pytest.approx(scores.max(dim=-1).values.tolist(), abs=1e-4)


def test_an_echo_stands_before_the_text(client: httpx.Client, base: str, oracle: Oracle) -> None:
    text = complete(client, base)["choices"][0]["text"]

    echoed = complete(client, base, echo=True)
    of_ids = complete(client, base, echo=True, prompt=oracle.ids(PROMPT))

    assert echoed["choices"][0]["text"] == PROMPT + text
    assert of_ids["choices"][0]["text"] == PROMPT + text


def test_offsets_say_where_a_token_begins_in_the_text(client: httpx.Client, base: str) -> None:
    [choice] = complete(client, base, prompt="añb", echo=True, logprobs=0, max_tokens=0)["choices"]

    assert choice["logprobs"]["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xb1", "b"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 1, 2]


def test_best_of_is_accepted_where_it_asks_for_nothing_more(
    client: httpx.Client, base: str
) -> None:
    assert len(complete(client, base, n=2, best_of=2)["choices"]) == 2


def test_unknown_and_neutral_fields_are_ignored(client: httpx.Client, base: str) -> None:
    plain = complete(client, base)

    answer = complete(
        client, base, user="u", suffix="", stop=None, logit_bias={}, made_up={"a": 1}, n=None
    )

    assert answer["choices"] == plain["choices"]
