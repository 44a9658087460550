"""Every row of a mixed batch is as exact as PEFT (invariants 1 and 2 of the design)."""

import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.engine.harness import Harness, Oracle
from tests.factories import TOKENS, tiny_model

TOKENS_OUT = 10


def prompts(count: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(7)
    return [
        [rng.randrange(5, TOKENS) for _ in range(rng.randint(1, longest))] for _ in range(count)
    ]


@pytest.fixture(scope="module")
def wanted(
    llama: PreTrainedModel, adapters: dict[str, Path]
) -> list[tuple[str | None, list[int], list[int]]]:
    """32 requests over the base and nine adapters: adapter, prompt, PEFT's greedy tokens."""
    names = [None, *adapters]
    oracles = {name: Oracle(llama, adapters.get(name or "")) for name in names}
    return [
        (name, prompt, oracles[name].greedy(prompt, TOKENS_OUT))
        for name, prompt in zip(itertools.cycle(names), prompts(32), strict=False)
    ]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({}, id="packed"),
        pytest.param({"pack_linears": False}, id="unpacked"),
        pytest.param({"prefill_chunk_tokens": 7}, id="prompts in small chunks"),
        pytest.param({"max_rows": 5}, id="few rows"),
        pytest.param({"max_resident": 3}, id="fewer slots than adapters"),
        pytest.param({"kv_cache_tokens": 1024}, id="room for only some rows"),
    ],
)
def test_32_mixed_requests_equal_peft_row_for_row(
    start: Callable[..., Harness],
    wanted: list[tuple[str | None, list[int], list[int]]],
    config: dict[str, object],
) -> None:
    engine = start(**config)
    with engine.held():
        for number, (adapter, prompt, _) in enumerate(wanted):
            engine.submit(str(number), prompt, adapter, max_tokens=TOKENS_OUT)
    engine.wait()

    for number, (adapter, _, expected) in enumerate(wanted):
        assert engine.answers[str(number)].tokens == expected, f"row {number} on {adapter}"
    engine.assert_idle()


def test_rows_that_outgrow_the_cache_are_preempted_and_end_the_same(
    start: Callable[..., Harness], llama: PreTrainedModel, adapters: dict[str, Path]
) -> None:
    engine = start(kv_cache_tokens=512)
    oracle = Oracle(llama, adapters["default"])
    asked = prompts(8, longest=8)
    with engine.held():
        for number, prompt in enumerate(asked):
            engine.submit(str(number), prompt, "default", max_tokens=80)
    engine.wait()

    assert engine.engine.stats().preemptions > 0
    for number, prompt in enumerate(asked):
        assert engine.answers[str(number)].tokens == oracle.greedy(prompt, 80)
    engine.assert_idle()


def test_float32_logits_err_at_most_twice_as_much_as_pefts_do(
    start: Callable[..., Harness], llama: PreTrainedModel, adapters: dict[str, Path]
) -> None:
    """Both are judged by PEFT in float64; log-probabilities of the whole vocabulary stand for the
    logits."""
    engine = start()
    asked = list(zip(adapters, prompts(len(adapters)), strict=True))
    with engine.held():
        for adapter, prompt in asked:
            engine.submit(adapter, prompt, adapter, max_tokens=1, prompt_logprobs=TOKENS)
    engine.wait()

    ours, pefts = [], []
    for adapter, prompt in asked:
        exact = Oracle(llama, adapters[adapter], torch.float64).logits(prompt).log_softmax(-1)
        peft = Oracle(llama, adapters[adapter]).logits(prompt).log_softmax(-1)
        pefts.append((peft - exact).abs().max().item())
        for position, scored in enumerate((engine.answers[adapter].prompt_logprobs or ())[1:]):
            assert scored is not None
            tokens, values = zip(*scored.top, strict=True)
            mine = torch.tensor(values, dtype=torch.float64)
            ours.append((mine - exact[position, list(tokens)]).abs().max().item())
    assert max(ours) <= 2 * max(pefts)


def scores_of_base_rows(
    engine: Harness, adapters: list[str | None]
) -> list[list[tuple[int, float]]]:
    """Every logit (as a log-probability) of the base rows in a batch of these adapters."""
    with engine.held():
        for number, (adapter, prompt) in enumerate(zip(adapters, prompts(8), strict=True)):
            engine.submit(str(number), prompt, adapter, max_tokens=6, logprobs=TOKENS)
    engine.wait()
    return [
        [pair for scored in engine.answers[str(number)].logprobs for pair in scored.top]
        for number in range(0, 8, 2)
    ]


def test_the_base_beside_adapters_equals_the_model_without_wrappers_bit_for_bit(
    start: Callable[..., Harness],
) -> None:
    """Every second row is the base's. In the plain engine no module is ever wrapped."""
    plain = scores_of_base_rows(start(), [None] * 8)
    mixed = [None, "default", None, "queries", None, "mlp-inward", None, "all-linear"]

    assert scores_of_base_rows(start(), mixed) == plain


def test_the_base_alone_after_adapters_ran_equals_the_model_without_wrappers_bit_for_bit(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    engine.ask([5, 6, 7], "all-linear")

    assert scores_of_base_rows(engine, [None] * 8) == scores_of_base_rows(start(), [None] * 8)


def test_a_bfloat16_base_equals_peft(
    start: Callable[..., Harness], adapters: dict[str, Path]
) -> None:
    base = tiny_model("llama").to(torch.bfloat16)
    engine = start(base)
    oracle = Oracle(tiny_model("llama").to(torch.bfloat16), adapters["mlp-inward"], torch.bfloat16)
    prompt = prompts(1)[0]

    scored = engine.ask(prompt, "mlp-inward", max_tokens=1, logprobs=TOKENS).logprobs[0]

    exact = oracle.logits(prompt)[-1].float().log_softmax(-1)
    tokens, values = zip(*scored.top, strict=True)
    assert torch.allclose(torch.tensor(values), exact[list(tokens)], atol=0.1)


def test_a_seeds_numbers_depend_on_nothing_but_the_place(
    start: Callable[..., Harness], adapters: dict[str, Path]
) -> None:
    """Alone, or among others: the token at place i is the one at which the
    running sum of its probabilities passes the seed's i-th number. So only the rounding of the
    model's own output can make a difference between two batches."""
    engine = start(speculation=True)
    names = [None, *adapters, None]
    params = {"temperature": 1.0, "max_tokens": 30, "logprobs": TOKENS}
    with engine.held():
        for seed in range(8):
            name = names[seed % len(names)]
            engine.submit(str(seed), [5 + seed] * 4, name, seed=seed, **params)
    engine.wait()
    for seed in (0, 1):
        engine.submit(f"{seed} alone", [5 + seed] * 4, names[seed], seed=seed, **params)
        engine.wait()

    for name, answer in engine.answers.items():
        numbers = random.Random(int(name.split()[0]))
        for scored in answer.logprobs:
            number = numbers.random()
            probabilities = [math.exp(logprob) for _, logprob in sorted(scored.top)]
            below = sum(probabilities[: scored.token_id])
            assert below - 1e-5 <= number <= below + probabilities[scored.token_id] + 1e-5
