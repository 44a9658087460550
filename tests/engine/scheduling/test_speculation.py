"""Drafted tokens change when an answer comes, and never which answer it is."""

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infuse.server.engine import FinishReason
from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.paged_cache import PagedCache
from infuse.server.engine.native.forward import execution
from tests.driver import Answer
from tests.engine.harness import Harness
from tests.factories import tiny_model

pytestmark = pytest.mark.usefixtures("free_tokens")

LOOP = [5, 9, 11, 5, 9, 11, 5, 9]
"""A prompt that repeats itself: drafts are taken from it."""


def begin(start: Callable[..., Harness], **config: Any) -> tuple[Harness, Harness]:
    """An engine that drafts wherever it can, and one that never does."""
    return start(**config, speculation=True), start(**config)


def same(ours: Answer, theirs: Answer) -> None:
    assert (ours.tokens, ours.text, ours.finish) == (theirs.tokens, theirs.text, theirs.finish)
    assert [each.token_id for each in ours.logprobs] == [each.token_id for each in theirs.logprobs]
    for mine, wanted in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert mine.logprob == pytest.approx(wanted.logprob, abs=1e-4)
        assert [token for token, _ in mine.top] == [token for token, _ in wanted.top]


PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.7, "seed": 3},
    "cold": {"temperature": 0.05, "seed": 4},
    "top-k": {"temperature": 0.8, "seed": 5, "top_k": 4},
    "top-p": {"temperature": 0.8, "seed": 6, "top_p": 0.6},
    "min-p": {"temperature": 0.8, "seed": 7, "min_p": 0.2},
    "all filters": {"temperature": 0.9, "seed": 8, "top_k": 30, "top_p": 0.8, "min_p": 0.05},
    "logprobs": {"logprobs": 3},
    "seeded logprobs": {"temperature": 0.3, "seed": 9, "logprobs": 2, "top_k": 5},
    "prompt logprobs": {"prompt_logprobs": 1, "logprobs": 1},
    "bias": {"logit_bias": {7: 30.0, 9: 29.0}},
    "bias at random": {"logit_bias": {7: 20.0, 9: 20.0}, "temperature": 0.5, "seed": 10},
    "end tokens": {"ignore_eos": False, "logit_bias": {2: 8.0}, "temperature": 0.8, "seed": 11},
    "min tokens": {"ignore_eos": False, "min_tokens": 9, "logit_bias": {2: 100.0}},
    "stop token": {"stop_token_ids": frozenset({9}), "logit_bias": {7: 30.0, 9: 29.9}},
    "presence": {"presence_penalty": 0.4},
    "frequency at random": {"frequency_penalty": 0.2, "temperature": 0.6, "seed": 12},
    "repetition": {"repetition_penalty": 1.2},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
}


def test_answers_are_the_same_token_by_token(
    start: Callable[..., Harness], adapters: dict[str, Path]
) -> None:
    """Each request alone, and all of them in one batch, each on an adapter of its own."""
    eager, plain = begin(start)
    names = dict(zip(PARAMS, cycle([None, *adapters]), strict=False))
    for engine in (eager, plain):
        with engine.held():
            for name, params in PARAMS.items():
                engine.submit(name, LOOP, names[name], **{"max_tokens": 30} | params)
        engine.wait()
    together = eager.engine.stats().accepted_tokens
    for name, params in PARAMS.items():
        same(eager.answers[name], plain.answers[name])
        alone = eager.ask(LOOP, names[name], **{"max_tokens": 30} | params)
        same(alone, plain.answers[name])

    assert 0 < together < eager.engine.stats().accepted_tokens
    assert plain.engine.stats().drafted_tokens == 0
    eager.assert_idle()


def test_an_accepted_draft_saves_a_step(start: Callable[..., Harness]) -> None:
    eager, plain = begin(start)
    same(eager.ask(LOOP, max_tokens=60), plain.ask(LOOP, max_tokens=60))
    stats = eager.engine.stats()

    assert stats.steps + stats.accepted_tokens == plain.engine.stats().steps
    assert 10 < stats.accepted_tokens <= stats.drafted_tokens
    assert stats.generated_tokens == plain.engine.stats().generated_tokens == 60


def test_a_stop_string_cuts_what_was_drafted_beyond_it(start: Callable[..., Harness]) -> None:
    eager, plain = begin(start)
    two = {"logit_bias": {70: 40.0, 72: 40.0}, "temperature": 1.0, "seed": 1, "max_tokens": 40}
    whole = plain.ask(LOOP, **two)
    for at in range(3, 36, 3):
        stops = {"stop": (whole.text[at : at + 7],), "logprobs": at % 2 or None}
        ours = eager.ask(LOOP, **two, **stops)
        same(ours, plain.ask(LOOP, **two, **stops))
        assert ours.finish is FinishReason.STOP
        assert ours.text == whole.text[: whole.text.index(stops["stop"][0])]
    assert eager.engine.stats().accepted_tokens > 0


def test_a_token_that_ends_the_text_cuts_what_was_drafted_beyond_it(
    start: Callable[..., Harness],
) -> None:
    eager, plain = begin(start)
    whole = plain.ask(LOOP, max_tokens=40).tokens
    for end in list(dict.fromkeys(whole))[::3]:
        params = {"max_tokens": 40, "stop_token_ids": frozenset({end})}
        same(eager.ask(LOOP, **params), plain.ask(LOOP, **params))
        params |= {"min_tokens": 11}
        same(eager.ask(LOOP, **params), plain.ask(LOOP, **params))


def test_answers_never_grow_beyond_their_length_or_the_window(
    start: Callable[..., Harness],
) -> None:
    eager, plain = begin(start, max_model_len=64, kv_cache_tokens=128)
    for length in range(1, 57, 5):
        ours = eager.ask(LOOP, max_tokens=length)
        same(ours, plain.ask(LOOP, max_tokens=length))
        assert len(ours.tokens) == length


def test_rows_are_drafted_beside_prompts_that_come_in_chunks(
    start: Callable[..., Harness], adapters: dict[str, Path]
) -> None:
    eager, plain = begin(start, prefill_chunk_tokens=4, max_rows=6)
    for engine in (eager, plain):
        with engine.held():
            for row, name in enumerate([None, *adapters]):
                engine.submit(str(row), LOOP * (1 + row % 4), name, max_tokens=10 + 3 * row)
        engine.wait()
    for row in eager.answers:
        same(eager.answers[row], plain.answers[row])
    assert eager.engine.stats().accepted_tokens > 0
    eager.assert_idle()


def test_rows_that_outgrow_the_cache_are_preempted_and_end_the_same(
    start: Callable[..., Harness],
) -> None:
    eager, plain = begin(start, kv_cache_tokens=512)
    for engine in (eager, plain):
        with engine.held():
            for row, name in enumerate([None, "default", "queries", "lm-head", None]):
                draws = {"temperature": 0.3 * (row == 4), "seed": 1}
                engine.submit(str(row), LOOP * 4, name, max_tokens=180, **draws)
        engine.wait()
    for row in eager.answers:
        same(eager.answers[row], plain.answers[row])
    assert eager.engine.stats().preemptions > 0
    assert eager.engine.stats().accepted_tokens > 0
    eager.assert_idle()


def test_choices_of_one_order_go_on_from_what_they_share(start: Callable[..., Harness]) -> None:
    eager, plain = begin(start)
    prompts = [LOOP * 6 + [tail] for tail in (5, 9, 11)]
    for temperature in (0.0, 0.5):
        for engine in (eager, plain):
            params = {"max_tokens": 30, "temperature": temperature, "seed": 2}
            engine.wait(*engine.order(str(temperature), prompts, "default", **params))
    for name in eager.answers:
        same(eager.answers[name], plain.answers[name])
    assert eager.engine.stats().accepted_tokens > 0
    eager.assert_idle()


def test_what_is_kept_of_a_drafted_answer_serves_the_next_turn(
    start: Callable[..., Harness],
) -> None:
    """Keys of rejected drafts are not among what the prefix cache keeps."""
    eager, plain = begin(start)
    turns: list[list[int]] = []
    for engine in (eager, plain):
        prompt = LOOP * 4
        for turn in range(3):
            answer = engine.ask(prompt, "default", max_tokens=37)
            prompt = [*prompt, *answer.tokens, 30 + turn]
        turns.append(prompt)
    stats = eager.engine.stats()

    assert turns[0] == turns[1]
    assert stats.accepted_tokens > 0
    assert stats.prefix_hit_tokens > len(LOOP * 4)


def test_blocks_on_the_device_are_as_exact_as_strips(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = start()
    monkeypatch.setattr(execution, "make_flat_cache", _make_paged)
    eager, _ = begin(start)
    for engine in (eager, plain):
        with engine.held():
            for row, name in enumerate([None, "default", "queries", "lm-head"]):
                engine.submit(str(row), LOOP * (row + 1), name, max_tokens=40)
        engine.wait()
    for row in eager.answers:
        same(eager.answers[row], plain.answers[row])
    assert eager.engine.stats().accepted_tokens > 0


def _make_paged(shapes: list[LayerShape], device: torch.device, **sizes: Any) -> PagedCache:
    return PagedCache(
        shapes, device, total_tokens=sizes["total_tokens"], max_tokens=sizes["max_tokens"]
    )


parts = st.lists(st.lists(st.integers(3, 12), min_size=1, max_size=6), min_size=1, max_size=5)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(parts, st.sampled_from([None, "default", "regex"]), st.sampled_from([0.0, 0.4])),
        min_size=1,
        max_size=4,
    ),
    prediction=parts,
)
def test_any_prompts_are_answered_as_without_drafts(
    pair: tuple[Harness, Harness],
    rows: list[tuple[list[list[int]], str | None, float]],
    prediction: list[list[int]],
) -> None:
    for engine in pair:
        with engine.held():
            for row, (texts, adapter, temperature) in enumerate(rows):
                engine.submit(
                    str(row),
                    [token for text in texts for token in text * 2],
                    adapter,
                    temperature=temperature,
                    seed=row,
                    max_tokens=20,
                    prediction=[token for text in prediction for token in text],
                    speculation=engine is pair[0],
                )
        engine.wait()
    for row in range(len(rows)):
        same(pair[0].answers.pop(str(row)), pair[1].answers.pop(str(row)))


@pytest.fixture
def pair(start: Callable[..., Harness]) -> tuple[Harness, Harness]:
    return begin(start)


@pytest.mark.parametrize(
    "params",
    [
        {"presence_penalty": 0.1},
        {"frequency_penalty": 0.1},
        {"repetition_penalty": 1.1},
        {"speculation": False},
        {"speculation": False, "prediction": LOOP},
    ],
    ids=str,
)
def test_rows_that_are_not_drafted(start: Callable[..., Harness], params: dict[str, Any]) -> None:
    """Penalties and grammars depend on the tokens before, drafts included."""
    eager, _ = begin(start)
    eager.submit("a", LOOP * 4, max_tokens=30, **params)
    eager.wait()

    assert eager.engine.stats().drafted_tokens == 0


def test_a_constrained_row_is_not_drafted(start: Callable[..., Harness]) -> None:
    eager, _ = begin(start)
    grammar = eager.engine.grammars.compile("regex", "(ab){20}", "regex")
    answer = eager.ask(LOOP, max_tokens=60, grammar=grammar, ignore_eos=False)

    assert answer.text == "ab" * 20
    assert eager.engine.stats().drafted_tokens == 0


def test_a_request_decides_for_itself(start: Callable[..., Harness]) -> None:
    off = start()
    off.ask(LOOP, max_tokens=20)
    assert off.engine.stats().drafted_tokens == 0
    off.submit("asks", LOOP, max_tokens=20, speculation=True)
    off.wait()

    assert off.engine.stats().drafted_tokens > 0


def test_a_model_that_runs_padded_is_not_drafted(start: Callable[..., Harness]) -> None:
    engine = start(tiny_model("bloom"), {})
    engine.submit("a", LOOP * 3, max_tokens=20, speculation=True)
    engine.wait()

    assert engine.engine.core.runner_kind == "padded"
    assert engine.engine.stats().drafted_tokens == 0


def test_a_prediction_is_drafted_from_its_first_token_on(start: Callable[..., Harness]) -> None:
    eager, plain = begin(start)
    prompt = [40, 3, 77]
    answer = plain.ask(prompt, "default", max_tokens=12).tokens
    eager.submit("foretold", prompt, "default", max_tokens=12, prediction=answer)
    eager.wait()
    told = eager.answers["foretold"]

    assert told.tokens == answer
    assert told.predicted == len(answer)
    assert told.deliveries == 2  # one after the prompt, and all the others
    eager.submit("wrong", prompt, "default", max_tokens=12, prediction=[250] * 12)
    eager.wait()
    assert eager.answers["wrong"].tokens == answer
    assert eager.answers["wrong"].predicted == 0
