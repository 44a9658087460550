"""What the requests of an order have in common is computed once, and nothing else changes."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from infuse.server.engine import FinishReason
from infuse.server.engine.native.cache.blocks import StripBlocks
from tests.driver import Answer
from tests.engine.harness import Harness, Oracle
from tests.factories import tiny_model

PROMPT = [5 + (7 * n) % 200 for n in range(60)]
CHOICES = [[9], [9, 10, 11], [12, 13], [9, 10, 14, 15]]
WHO = [None, "default", "regex", "queries"]


def logprobs(answer: Answer) -> list[float]:
    """Of the prompt's tokens from the second on, then of the answer's."""
    _, *prompt = answer.prompt_logprobs or ()
    return [scored.logprob for scored in (*prompt, *answer.logprobs) if scored is not None]


def test_choices_score_as_peft_scores_them_whatever_shares_the_batch(
    start: Callable[..., Harness], adapters: dict[str, Path]
) -> None:
    base = tiny_model("llama")
    oracles = [Oracle(base, adapters.get(who or "")) for who in WHO]
    engine = start(base, prefill_chunk_tokens=100)
    prompts = [PROMPT + choice for choice in CHOICES]
    with engine.held():
        orders = [
            engine.order(
                str(who),
                prompts,
                who,
                max_tokens=0,
                prompt_logprobs=0,
                prompt_logprobs_from=len(PROMPT),
            )
            for who in WHO
        ]
    engine.wait()

    for oracle, order in zip(oracles, orders, strict=True):
        for prompt, request_id in zip(prompts, order, strict=True):
            expected = oracle.logits(prompt).log_softmax(-1)
            scores = engine.answers[request_id].prompt_logprobs
            assert scores is not None
            assert scores[: len(PROMPT)] == (None,) * len(PROMPT)
            for place in range(len(PROMPT), len(prompt)):
                scored = scores[place]
                assert scored is not None
                wanted = expected[place - 1, prompt[place]].item()
                assert (scored.token_id, scored.logprob) == (
                    prompt[place],
                    pytest.approx(wanted, abs=1e-4),
                )
    # The prompt once for each order. What a choice is scored by, it computes itself, unless the
    # choice before it has just scored the same.
    assert engine.engine.stats().prompt_tokens == 1 + len(WHO) * (61 + 3 + 3 + 4)
    engine.assert_idle()


@pytest.mark.parametrize("config", [{}, {"max_rows": 1}, {"kv_cache_tokens": 512}])
def test_samples_of_one_prompt_answer_as_if_alone(
    start: Callable[..., Harness], config: dict[str, int]
) -> None:
    """With all the room that they want, with one row, and in a cache that they outgrow."""
    engine = start(**config)
    asked = {"max_tokens": 70, "temperature": 0.0, "logprobs": 0, "prompt_logprobs": 1}
    alone = {who: engine.ask(PROMPT, who, **asked) for who in WHO[:2]}
    orders = {who: engine.order(str(who), [PROMPT] * 3, who, **asked) for who in alone}
    engine.wait()

    for who, order in orders.items():
        for answer in (engine.answers[each] for each in order):
            assert answer.tokens == alone[who].tokens
            assert logprobs(answer) == pytest.approx(logprobs(alone[who]), abs=1e-4)
    engine.assert_idle()


def test_a_prompt_is_computed_once_however_many_samples_it_has(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    engine.order("many", [PROMPT] * 8, "default", temperature=1.0)
    engine.wait()

    assert engine.engine.stats().prompt_tokens == len(PROMPT) + 7


def test_requests_that_share_nothing_leave_nothing(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []

    def keep(_: StripBlocks, row: int, *__: int) -> list[int]:
        kept.append(row)
        return []

    monkeypatch.setattr(StripBlocks, "keep", keep)
    engine = start(tiny_model("llama"), prefix_cache=False)
    with engine.held():
        for tokens in (2, 5):
            engine.submit(f"{tokens}", PROMPT, max_tokens=tokens)
    engine.wait()

    assert not kept


def test_samples_go_on_when_the_first_is_cancelled(start: Callable[..., Harness]) -> None:
    engine = start(prefill_chunk_tokens=8)
    alone = engine.ask(PROMPT, "default").tokens
    with engine.held():
        first, *others = engine.order("samples", [PROMPT] * 3, "default")
        engine.engine.cancel(first)
    engine.wait()

    assert engine.answers[first].finish is FinishReason.CANCELLED
    assert all(engine.answers[each].tokens == alone for each in others)
    engine.assert_idle()


def test_any_order_answers_like_its_requests_alone(start: Callable[..., Harness]) -> None:
    chance = Random(0)
    engine = start(prefill_chunk_tokens=32, kv_cache_tokens=1024, max_rows=5)
    orders: dict[str, tuple[list[list[int]], str | None]] = {}
    for number in range(6):
        stems = [PROMPT[: chance.randint(1, 60)] for _ in range(2)]
        ends = [[chance.randint(5, 250) for _ in range(chance.randint(1, 40))] for _ in range(3)]
        prompts = [stem + end + [9] * chance.randint(0, 2) for stem in stems for end in ends]
        orders[str(number)] = prompts, chance.choice(WHO)
    asked = [engine.order(name, *order, max_tokens=8) for name, order in orders.items()]
    engine.wait()
    answers = [[engine.answers[each].tokens for each in order] for order in asked]

    for found, (prompts, who) in zip(answers, orders.values(), strict=True):
        assert found == [engine.ask(prompt, who, max_tokens=8).tokens for prompt in prompts]
    engine.assert_idle()


def test_samples_take_the_scores_of_their_prompt_from_the_first(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    first, *others = engine.order("scored", [PROMPT] * 3, "default", prompt_logprobs=2)
    engine.wait()

    scores = engine.answers[first].prompt_logprobs
    assert scores is not None
    assert None not in scores[1:]
    assert all(engine.answers[each].prompt_logprobs == scores for each in others)
    assert engine.engine.stats().prompt_tokens == len(PROMPT) + 2
