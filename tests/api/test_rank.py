"""Rank classification, against log-likelihoods of PEFT's own model."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import RunningServer
from tests.api.oracle import Oracle
from tests.api.test_streaming import at_rest

PROMPT = "The order arrived"
CHOICES = [" late", " on time", "!"]


def rank(client: httpx.Client, **body: Any) -> httpx.Response:
    return client.post("/v1/rank", json={"model": "tiny", **body})


def likelihood(oracle: Oracle, prompt: str, choice: str) -> tuple[float, int]:
    """The sum over the choice's tokens (a byte each) of their log-probabilities."""
    ids = oracle.ids(prompt + choice)
    count = len(ids) - len(oracle.ids(prompt))
    scores = oracle.scores(ids)
    return sum(scores[i - 1, ids[i]].item() for i in range(len(ids) - count, len(ids))), count


@pytest.mark.parametrize("name", [None, "default", "mlp"])
def test_choices_are_scored_by_their_mean_log_probability(
    client: httpx.Client, model_folder: Path, adapter_folders: dict[str, Path], name: str | None
) -> None:
    oracle = Oracle(model_folder, adapter_folders.get(name or ""))
    wanted = [likelihood(oracle, PROMPT, choice) for choice in CHOICES]
    answer = rank(client, model=name or "tiny", inputs=[{"prompt": PROMPT, "choices": CHOICES}])

    assert answer.status_code == 200, answer.text
    [ranking] = answer.json()["data"]
    assert [c["tokens"] for c in ranking["choices"]] == [count for _, count in wanted]
    for choice, (total, count) in zip(ranking["choices"], wanted, strict=True):
        assert choice["logprob"] == pytest.approx(total, abs=1e-3)
        assert choice["score"] == pytest.approx(total / count, abs=1e-3)
    means = [total / count for total, count in wanted]
    assert ranking["best"] == means.index(max(means))


@pytest.mark.native
def test_a_prompt_is_computed_once_for_all_its_choices(
    client: httpx.Client, server: RunningServer
) -> None:
    engine = server.services.engine
    prompts = [f"Input {number}: {PROMPT} after a week of waiting." for number in range(3)]
    inputs = [{"prompt": prompt, "choices": [" late", "!", "?"]} for prompt in prompts]
    before = engine.stats().prompt_tokens
    answer = rank(client, inputs=inputs, model="default").json()
    computed = engine.stats().prompt_tokens - before

    # What scores a choice is computed for it: also the prompt's last token.
    again = 2
    assert computed == sum(len(prompt) + len(" late!?") + again for prompt in prompts)
    assert answer["usage"]["prompt_tokens_details"] == {
        "cached_tokens": answer["usage"]["prompt_tokens"] - computed
    }
    assert answer["usage"]["prompt_tokens"] == sum(
        3 * len(prompt) + len(" late!?") for prompt in prompts
    )


def test_rankings_with_several_adapters_at_once_are_t_fews(
    client: httpx.Client, model_folder: Path, adapter_folders: dict[str, Path]
) -> None:
    """T-Few's score: the loss summed over a choice's tokens, by their number; the least is best."""
    inputs = [
        {"prompt": f"{PROMPT} on day {day}, which the customer found to be", "choices": CHOICES}
        for day in range(4)
    ]
    with ThreadPoolExecutor() as pool:
        models = ["tiny", *adapter_folders]
        answers = list(pool.map(lambda name: rank(client, model=name, inputs=inputs), models))

    for name, answer in zip(models, answers, strict=True):
        oracle = Oracle(model_folder, adapter_folders.get(name))
        for ranking, each in zip(answer.json()["data"], inputs, strict=True):
            losses = [oracle.loss(str(each["prompt"]), choice) for choice in CHOICES]
            assert [c["score"] for c in ranking["choices"]] == pytest.approx(
                [-loss for loss in losses], abs=1e-3
            )
            assert ranking["best"] == losses.index(min(losses))


def test_a_choice_may_end_with_the_end_token_as_t_fews_do(
    client: httpx.Client, model_folder: Path
) -> None:
    inputs = [{"prompt": PROMPT, "choices": [" late</s>"]}]
    [ranking] = rank(client, inputs=inputs).json()["data"]

    loss = Oracle(model_folder).loss(PROMPT, " late</s>")
    assert ranking["choices"][0]["tokens"] == len(" late") + 1
    assert ranking["choices"][0]["score"] == pytest.approx(-loss, abs=1e-3)


def test_without_normalising_a_score_is_the_sum(client: httpx.Client) -> None:
    inputs = [{"prompt": PROMPT, "choices": CHOICES}]
    [ranking] = rank(client, inputs=inputs, normalize="none").json()["data"]

    assert all(choice["score"] == choice["logprob"] for choice in ranking["choices"])


def test_all_inputs_are_answered_in_order_and_counted(client: httpx.Client) -> None:
    inputs = [{"prompt": PROMPT, "choices": CHOICES[:2]}, {"prompt": "Is it", "choices": [" so?"]}]
    answer = rank(client, inputs=inputs).json()

    assert [r["index"] for r in answer["data"]] == [0, 1]
    assert [len(r["choices"]) for r in answer["data"]] == [2, 1]
    tokens = sum(len(str(each["prompt"]) + c) for each in inputs for c in each["choices"])
    assert answer["usage"]["prompt_tokens"] == tokens
    assert answer["usage"]["completion_tokens"] == 0


def test_token_ids_rank_like_their_text(client: httpx.Client, server: RunningServer) -> None:
    encode = server.services.engine.model.tokenizer.encode
    ids = [{"prompt": encode(PROMPT), "choices": [encode(choice) for choice in CHOICES]}]
    [by_ids] = rank(client, inputs=ids).json()["data"]
    [by_text] = rank(client, inputs=[{"prompt": PROMPT, "choices": CHOICES}]).json()["data"]

    assert by_ids["best"] == by_text["best"]
    for mine, theirs in zip(by_ids["choices"], by_text["choices"], strict=True):
        assert mine["logprob"] == pytest.approx(theirs["logprob"], abs=1e-3)


def test_blanks_at_the_end_of_a_prompt_count_to_the_choice(client: httpx.Client) -> None:
    [ranking] = rank(client, inputs=[{"prompt": "It is ", "choices": ["so"]}]).json()["data"]

    assert ranking["choices"][0]["tokens"] == 3


def test_a_mixture_ranks_too(client: httpx.Client) -> None:
    inputs = [{"prompt": PROMPT, "choices": CHOICES}]
    mixed = rank(client, inputs=inputs, adapters=[{"name": "default"}])
    [alone] = rank(client, model="default", inputs=inputs).json()["data"]

    assert mixed.headers["infuse-adapter"] == "product(default@1*1)"
    assert mixed.json()["data"][0]["best"] == alone["best"]


def test_half_a_character_is_refused(client: httpx.Client) -> None:
    body = r'{"model": "tiny", "inputs": [{"prompt": "a\ud800", "choices": ["b"]}]}'
    answer = client.post("/v1/rank", content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert "surrogate" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"inputs": []}, 400),
        ({"inputs": [{"prompt": "", "choices": ["a"]}]}, 400),
        ({"inputs": [{"prompt": "a", "choices": []}]}, 400),
        ({"inputs": [{"prompt": "a", "choices": [""]}]}, 400),
        ({"inputs": [{"prompt": "a", "choices": [[5]]}]}, 400),
        ({"inputs": [{"prompt": [5], "choices": [[99999]]}]}, 400),
        ({"inputs": [{"prompt": "a" * 300, "choices": ["b"]}]}, 400),
        ({"inputs": [{"prompt": "a", "choices": ["b"] * 257}]}, 400),
        ({"inputs": [{"prompt": "a", "choice": ["b"]}]}, 400),
        ({"normalize": "bytes"}, 400),
        ({"model": "nobody"}, 404),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_what_cannot_be_ranked_is_named(
    client: httpx.Client, server: RunningServer, change: dict[str, Any], status: int
) -> None:
    body = {"inputs": [{"prompt": PROMPT, "choices": CHOICES}]} | change
    answer = rank(client, **body)

    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]
    assert at_rest(server)
