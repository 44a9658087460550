"""The model thread outlives whatever one request brings, or says that it is dead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infuse.server.engine import EngineDead, FinishReason
from infuse.server.engine.constraints import grammars
from infuse.server.engine.detokenizer import Detokenizer
from infuse.server.engine.native.scheduling.scheduler import Scheduler
from infuse.server.engine.native.sequences import sequence
from infuse.server.engine.native.sequences.sequence import Sequence
from tests.engine.harness import Harness
from tests.engine.sequences.test_detokenizer import TOKENIZER, ids, replacing_tokenizer
from tests.factories import byte_fallback_tokenizer, panic, tiny_model

FALLBACK = byte_fallback_tokenizer()


def bare() -> None:
    raise Exception("Invalid prefix encountered while decoding stream")


def test_halves_of_characters_between_byte_tokens_end_nothing(
    start: Callable[..., Harness],
) -> None:
    base = tiny_model("llama", vocab_size=len(FALLBACK))
    engine = start(base, {}, tokenizer=FALLBACK)
    half, whole = ids(FALLBACK, "€")[:1], ids(FALLBACK, "€")
    bias = dict.fromkeys((*whole, *half), 100.0)
    prompt = ids(FALLBACK, "ab\n")
    for seed in range(4):
        drawn = {"temperature": 2.0, "seed": seed, "logit_bias": bias, "max_tokens": 60}
        answer = engine.ask(prompt, **drawn)
        assert answer.finish is FinishReason.LENGTH
        assert "\ufffd" in answer.text
    assert engine.engine.stats().alive
    engine.assert_idle()


def test_a_decoder_that_takes_text_back_ends_nothing(start: Callable[..., Harness]) -> None:
    engine = start(None, {}, tokenizer=replacing_tokenizer())
    drawn = {"temperature": 2.0, "seed": 1, "logit_bias": {0: 100.0, 1: 100.0}, "max_tokens": 40}

    answer = engine.ask([2], **drawn)

    assert answer.finish is FinishReason.LENGTH
    assert answer.text == "".join("ab"[token] for token in answer.tokens)
    engine.assert_idle()


def test_a_broken_character_at_the_prompts_end_breaks_no_constraint(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    grammar = engine.engine.grammars.compile("choice", ["yes", "no"], "choice")
    for end in (ids(TOKENIZER, "\ufffd"), ids(TOKENIZER, "€")[:-1], ids(TOKENIZER, "€")[:1]):
        prompt = ids(TOKENIZER, "line\n is ") + end
        answer = engine.ask(prompt, grammar=grammar, ignore_eos=False, stop=("\n",))
        assert answer.text in {"yes", "no"}


@pytest.mark.parametrize("fails", [panic, bare, lambda: {}["no"], lambda: 1 / 0])
@pytest.mark.parametrize("when", ["push", "finish", "__init__"])
def test_whatever_a_tokenizer_raises_is_its_own_requests_failure(
    start: Callable[..., Harness],
    monkeypatch: pytest.MonkeyPatch,
    fails: Callable[[], object],
    when: str,
) -> None:
    engine = start()

    class Failing(Detokenizer):
        pass

    def make(*given: Any, **named: Any) -> Detokenizer:
        is_failing = ("fail",) in (*given, *named.values())
        return (Failing if is_failing else Detokenizer)(*given, **named)

    setattr(Failing, when, lambda *_, **__: fails())
    with engine.held():
        engine.submit("runs", [5], "default", max_tokens=9)
        engine.submit("fails", [5], "default", max_tokens=3, stop=("fail",))
        monkeypatch.setattr(sequence, "Detokenizer", make)
    engine.wait()

    assert engine.answers["fails"].finish is FinishReason.ERROR
    assert engine.answers["fails"].error
    assert len(engine.answers["runs"].tokens) == 9
    assert engine.ask([5], max_tokens=3).finish is FinishReason.LENGTH
    engine.assert_idle()


def test_a_panic_in_the_making_of_masks_ends_no_other_request(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    grammar = engine.engine.grammars.compile("choice", ["a" * 40], "choice")
    monkeypatch.setattr(grammars, "fill_next_token_bitmask_par", lambda *_: panic())
    with engine.held():
        engine.submit("held", [5], grammar=grammar, max_tokens=30)
        engine.submit("free", [5], max_tokens=30)
    engine.wait()

    assert engine.answers["held"].finish is FinishReason.ERROR
    assert len(engine.answers["free"].tokens) == 30
    engine.assert_idle()


@pytest.mark.parametrize("fails", [panic, bare, lambda: {}["no"]])
def test_what_is_no_requests_own_leaves_a_dead_engine_and_no_request_waiting(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch, fails: Callable[[], object]
) -> None:
    engine = start()
    with engine.held():
        engine.submit("runs", [5], "default", max_tokens=9)
        engine.submit("waits", [5], "queries", max_tokens=9)
        monkeypatch.setattr(Scheduler, "schedule", lambda _: fails())
        monkeypatch.setattr(Scheduler, "remove", lambda *_: fails())
    engine.wait()

    for name in ("runs", "waits"):
        assert engine.answers[name].finish is FinishReason.ENGINE_DEAD
    assert not engine.engine.stats().alive
    with pytest.raises(EngineDead):
        engine.submit("late", [5])
    assert engine.registry.stats().leases == 0


def test_a_request_that_cannot_begin_says_why_whatever_that_is(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()

    def lost(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sequence, "Detokenizer", lost)
    answer = engine.ask([5], "default")

    assert answer.finish is FinishReason.ERROR
    assert "cannot begin: CUDA error" in answer.error
    monkeypatch.undo()
    assert engine.ask([5], "default").finish is FinishReason.LENGTH
    engine.assert_idle()


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_request_whose_end_fails_is_answered(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    engine = start()
    with engine.held():
        engine.submit("ends", [5], "default", max_tokens=3)
        monkeypatch.setattr(Sequence, "predicted_tokens", property(lambda _: 1 / 0))
        if cancelled:
            engine.engine.cancel("ends")
    engine.wait()

    assert engine.answers["ends"].finish is FinishReason.ENGINE_DEAD
    assert engine.registry.stats().leases == 0


def test_what_breaks_the_engine_keeps_back_no_answer_that_has_ended_in_the_same_step(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start()
    remove = Scheduler.remove

    def remove_one(scheduler: Scheduler, each: Sequence) -> None:
        if each.request.id == "breaks":
            panic()
        remove(scheduler, each)

    with engine.held():
        engine.submit("ends", [5], "default", max_tokens=1)
        engine.submit("breaks", [6], "default", max_tokens=1)
        monkeypatch.setattr(Scheduler, "remove", remove_one)
    engine.wait()

    assert engine.answers["ends"].finish is FinishReason.LENGTH
    assert len(engine.answers["ends"].tokens) == 1
    assert engine.answers["breaks"].finish is FinishReason.ENGINE_DEAD
    assert engine.registry.stats().leases == 0
