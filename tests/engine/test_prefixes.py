"""What the requests of an order have in common is computed once, and nothing else changes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine import FinishReason, GenerationRequest, SamplingParams
from server.engine.prefixes import LEAST_SHARED, share_prefixes
from tests.engine.harness import Answer, Harness, Oracle
from tests.factories import tiny_model

PROMPT = [5 + (7 * n) % 200 for n in range(60)]
CHOICES = [[9], [9, 10, 11], [12, 13], [9, 10, 14, 15]]
WHO = [None, "default", "regex", "queries"]


def requests_of(
    prompts: Sequence[Sequence[int]], scored_from: Sequence[int] | None = None
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            id=str(number),
            prompt=tuple(prompt),
            params=SamplingParams(max_tokens=1, prompt_logprobs_from=first),
        )
        for number, (prompt, first) in enumerate(
            zip(prompts, scored_from or [1] * len(prompts), strict=True)
        )
    ]


def logprobs(answer: Answer) -> list[float]:
    """Of the prompt's tokens from the second on, then of the answer's."""
    _, *prompt = answer.prompt_logprobs or ()
    return [scored.logprob for scored in (*prompt, *answer.logprobs) if scored is not None]


def followed(requests: Sequence[GenerationRequest]) -> list[tuple[str, int] | None]:
    prefixes = [request.prefix for request in share_prefixes(requests)]
    return [None if each is None else (each.leader, each.tokens) for each in prefixes]


def test_the_choices_of_a_prompt_follow_the_first() -> None:
    prompts = [PROMPT + choice for choice in CHOICES]

    assert followed(requests_of(prompts)) == [None, ("0", 61), ("0", 60), ("0", 61)]


def test_samples_of_one_prompt_follow_the_first() -> None:
    assert followed(requests_of([PROMPT] * 3)) == [None, ("0", 60), ("0", 60)]


def test_prompts_that_begin_alike_follow_too_and_their_choices_follow_them() -> None:
    inputs = [[*PROMPT, 5, *[6] * 40], [*PROMPT, 7, *[8] * 40]]
    prompts = [[*each, *choice] for each in inputs for choice in ([9], [10])]

    assert followed(requests_of(prompts)) == [None, ("0", 101), ("0", 60), ("2", 101)]


def test_a_few_tokens_are_not_worth_a_step() -> None:
    few = PROMPT[: LEAST_SHARED - 1]

    assert followed(requests_of([[*few, 5], [*few, 6]])) == [None, None]


@given(
    st.lists(
        st.tuples(st.lists(st.integers(5, 6), max_size=4), st.integers(1, 60)),
        min_size=1,
        max_size=12,
    )
)
def test_what_is_shared_is_common_and_the_leader_scores_it(
    found: list[tuple[list[int], int]],
) -> None:
    prompts = [PROMPT[:20] * (1 + len(end) % 3) + end + [7] for end, _ in found]
    firsts = [min(first, len(p) - 1) for (_, first), p in zip(found, prompts, strict=True)]
    shared = share_prefixes(requests_of(prompts, firsts))
    places = {request.id: place for place, request in enumerate(shared)}
    for place, request in enumerate(shared):
        first = request.params.prompt_logprobs_from
        if request.prefix is not None:
            leader = shared[places[request.prefix.leader]]
            tokens = request.prefix.tokens
            assert places[leader.id] < place
            assert tokens >= LEAST_SHARED
            assert leader.prompt[:tokens] == request.prompt[:tokens]
            assert tokens <= first or leader.params.prompt_logprobs_from <= first


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
    # The prompt once for each order; of a follower, its own tokens and the last that it shares.
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
