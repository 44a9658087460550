"""Steps that fail: what can run does, with the same result, and the rest fails alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from infuse.server.engine import FinishReason
from infuse.server.engine.detokenizer import Detokenizer
from infuse.server.engine.native import stepping
from infuse.server.engine.native.cache import padded_cache
from infuse.server.engine.native.cache.padded_cache import PaddedCache
from infuse.server.engine.native.cache.padded_layers import KeysAndValues, empty_layer
from infuse.server.engine.native.sampling import sampler
from tests.driver import Answer
from tests.engine.harness import Harness
from tests.factories import run_by_modules, tiny_model
from tests.families import tiny
from tests.hybrid_families import HYBRIDS, tiny_hybrid

BAD = 200
"""A token that the failing models below cannot read."""
PROMPTS = [[5 + (7 * n + 3 * row) % 60 for n in range(3 + 5 * row)] for row in range(8)]
FAMILIES = ["llama", "bloom", "bart", "qwen3_next"]
"""Flat, padded, an encoder-decoder, and one that carries a state."""


class Faulty:
    """A model whose forwards fail halfway: some layers' keys are written then, the last one's not.

    `fails` is asked with the ids, `[rows, tokens]`; a flat batch is one row.
    """

    def __init__(self, fails: Callable[[torch.Tensor], bool], error: Exception) -> None:
        self.forwards = self.failures = 0
        self._fails, self._error = fails, error
        self._failing = False

    @contextmanager
    def of(self, model: PreTrainedModel) -> Iterator["Faulty"]:
        *_, layers = (each for each in model.modules() if isinstance(each, nn.ModuleList))
        handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            layers[-1].register_forward_pre_hook(self._reach),
        ]
        yield self
        for handle in handles:
            handle.remove()

    def _begin(self, _: object, __: object, inputs: dict[str, Any]) -> None:
        self.forwards += 1
        ids = inputs["decoder_input_ids"] if "decoder_input_ids" in inputs else inputs["input_ids"]
        self._failing = self._fails(ids)

    def _reach(self, *_: object) -> None:
        if self._failing:
            self.failures += 1
            raise self._error


def gpu_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def cpu_memory() -> Exception:
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def onednn_memory() -> Exception:
    return RuntimeError("could not create a primitive")


def reads_bad(ids: torch.Tensor) -> bool:
    return bool((ids == BAD).any())


def start_engine(
    start: Callable[..., Harness], family: str, prefix_cache: bool = False
) -> tuple[PreTrainedModel, Harness]:
    """Without a prefix cache, or the second time would compute little of the prompts."""
    if family in HYBRIDS:
        base = tiny_hybrid(family)
    else:
        base = run_by_modules(tiny_model("llama") if family == "llama" else tiny(family))
    offered = None if family == "llama" else {}
    return base, start(base, offered, prefix_cache=prefix_cache)


def ask_all(engine: Harness, **params: Any) -> list[Answer]:
    """All prompts at once, on a flat model with several adapters."""
    who = (
        [None, "default", "regex", "queries"]
        if engine.engine.core.runner_kind == "flat"
        else [None]
    )
    with engine.held():
        for row, prompt in enumerate(PROMPTS):
            engine.submit(str(row), prompt, who[row % len(who)], **{"max_tokens": 12} | params)
    engine.wait()
    return [engine.answers.pop(str(row)) for row in range(len(PROMPTS))]


def assert_alike(some: list[Answer], others: list[Answer]) -> None:
    assert [each.tokens for each in some] == [each.tokens for each in others]
    assert {each.finish for each in some} == {FinishReason.LENGTH}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("error", [gpu_memory(), cpu_memory(), onednn_memory(), MemoryError()])
def test_steps_too_large_for_the_memory_run_in_parts(
    start: Callable[..., Harness], family: str, error: Exception
) -> None:
    base, engine = start_engine(start, family)
    usual = ask_all(engine)
    with Faulty(lambda ids: ids.numel() > 5, error).of(base):
        parts = ask_all(engine)

    assert_alike(parts, usual)
    assert engine.engine.stats().step_retries > 0
    engine.assert_idle()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 3, "presence_penalty": 0.5}])
def test_whatever_fails_on_the_way_answers_stay_the_same(
    start: Callable[..., Harness],
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    params: dict[str, Any],
) -> None:
    base, engine = start_engine(start, family)
    usual = ask_all(engine, **params)
    monkeypatch.setattr(stepping, "RECOVERY_STEPS", 1)
    random = Random(5)
    failing = Faulty(lambda ids: ids.numel() > 1 and random.random() < 0.7, gpu_memory())
    with failing.of(base):
        parts = ask_all(engine, **params)

    assert_alike(parts, usual)
    assert failing.failures >= 8
    engine.assert_idle()


def test_steps_stay_small_for_a_while(start: Callable[..., Harness]) -> None:
    base, engine = start_engine(start, "llama")
    failing = Faulty(lambda ids: ids.numel() > 5, gpu_memory())
    with failing.of(base):
        ask_all(engine, max_tokens=200)
    failures = failing.failures
    with Faulty(lambda _: False, gpu_memory()).of(base) as healthy:
        engine.ask([5], max_tokens=200)
        ask_all(engine, max_tokens=100)

    assert failures < 25  # of 200 steps, and each takes at least two forwards
    assert healthy.forwards < 200 + 1.2 * (100 + sum(map(len, PROMPTS)) / 256 + 1)


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_one_request_too_large_for_the_memory_fails_alone(
    start: Callable[..., Harness], family: str
) -> None:
    base, engine = start_engine(start, family)
    usual = ask_all(engine)
    with Faulty(reads_bad, gpu_memory()).of(base):
        with engine.held():
            engine.submit("bad", [5, BAD, 6])
        others = ask_all(engine)
        engine.wait("bad")

    assert_alike(others, usual)
    assert engine.answers["bad"].finish is FinishReason.ERROR
    assert "not enough memory for this request" in engine.answers["bad"].error
    engine.assert_idle()


@pytest.mark.parametrize("family", FAMILIES[:2])
def test_a_faulty_request_fails_alone_in_a_few_forwards(
    start: Callable[..., Harness], family: str
) -> None:
    base, engine = start_engine(start, family)
    usual = [engine.ask(prompt, max_tokens=1) for prompt in PROMPTS]
    with Faulty(reads_bad, RuntimeError("index out of range")).of(base) as failing:
        with engine.held():
            engine.submit("bad", [5, BAD, 6])
            for row, prompt in enumerate(PROMPTS):
                engine.submit(str(row), prompt, max_tokens=1)
        engine.wait()

    assert engine.answers["bad"].finish is FinishReason.ERROR
    assert engine.answers["bad"].error == "The model failed: index out of range"
    assert_alike([engine.answers[str(row)] for row in range(len(PROMPTS))], usual)
    if family == "llama":
        assert failing.failures <= 5  # the whole, its halves, … and alone: one in nine
        assert failing.forwards - 1 < 2 * 9
    engine.assert_idle()


def test_if_everything_fails_each_request_says_so_after_a_bounded_effort(
    start: Callable[..., Harness],
) -> None:
    base, engine = start_engine(start, "llama")
    with Faulty(lambda _: True, RuntimeError("broken")).of(base) as failing:
        for row, prompt in enumerate(PROMPTS):
            engine.submit(str(row), prompt)
        engine.wait()

    assert {answer.error for answer in engine.answers.values()} == {"The model failed: broken"}
    assert failing.forwards < 2 * len(PROMPTS)
    assert engine.ask([5]).finish is FinishReason.LENGTH
    engine.assert_idle()


def test_drafts_are_left_out_where_they_find_no_memory(start: Callable[..., Harness]) -> None:
    base, engine = start_engine(start, "llama")
    prompt = [5, 6, 7, 8] * 6
    usual = engine.ask(prompt, max_tokens=30)
    with Faulty(lambda ids: 1 < ids.numel() < 24, gpu_memory()).of(base) as failing:
        answer = engine.ask(prompt, max_tokens=30, speculation=True)

    assert_alike([answer], [usual])
    assert failing.failures > 0


def test_keys_that_are_lost_as_rows_come_together_are_computed_again(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, healthy = start_engine(start, "bloom")
    usual = ask_all(healthy)
    _, engine = start_engine(start, "bloom", prefix_cache=True)
    calls = iter(range(10_000))

    def scarce(*args: Any) -> KeysAndValues:
        if next(calls) % 7 == 5:
            raise gpu_memory()
        return empty_layer(*args)

    monkeypatch.setattr(padded_cache, "empty_layer", scarce)
    parts = ask_all(engine)

    ended = [pair for pair in zip(parts, usual, strict=True) if not pair[0].error]
    assert len(ended) >= len(PROMPTS) - 2
    assert_alike([part for part, _ in ended], [alone for _, alone in ended])
    assert engine.engine.stats().preemptions > 0
    engine.assert_idle()


@pytest.mark.parametrize("family", FAMILIES)
def test_sampling_that_finds_no_memory_is_done_in_parts(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    _, engine = start_engine(start, family)
    params = {"temperature": 1.0, "seed": 3, "logprobs": 2, "frequency_penalty": 0.5}
    usual = ask_all(engine, **params)
    score = sampler.score_tokens

    def scarce(logits: torch.Tensor, *args: Any) -> Any:
        if logits.shape[0] > 3:
            raise gpu_memory()
        return score(logits, *args)

    monkeypatch.setattr(sampler, "score_tokens", scarce)
    parts = ask_all(engine, **params)

    assert_alike(parts, usual)
    assert engine.engine.stats().step_retries > 0
    engine.assert_idle()


def test_an_adapter_that_finds_no_memory_on_the_device_fails_its_own_request(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = start_engine(start, "llama")
    fill = engine.ia3.fill_slot

    def scarce(slot: int, vectors: Any) -> None:
        if vectors is cold:
            raise gpu_memory()
        fill(slot, vectors)

    monkeypatch.setattr(engine.ia3, "fill_slot", scarce)
    lease = engine.registry.lease("mlp-inward")
    cold = lease.vectors
    with engine.held():
        engine.submit("fails", [5], lease)
        engine.submit("runs", [5], "default")
    engine.wait()

    assert "not enough memory" in engine.answers["fails"].error
    assert engine.answers["runs"].finish is FinishReason.LENGTH
    monkeypatch.undo()
    assert engine.ask([5], "mlp-inward").finish is FinishReason.LENGTH
    engine.assert_idle()


def test_keys_that_find_no_memory_to_be_kept_are_given_up(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = start_engine(start, "bloom", prefix_cache=True)
    prompt = list(range(5, 65))

    def none_left(*_: object, **__: object) -> None:
        raise gpu_memory()

    with monkeypatch.context() as scarce:
        scarce.setattr(PaddedCache, "layers_of", none_left)
        assert engine.ask(prompt).finish is FinishReason.LENGTH
        assert engine.engine.stats().kv_tokens_cached == 0
    assert engine.ask(prompt).finish is FinishReason.LENGTH
    assert engine.engine.stats().kv_tokens_cached > 0


def test_a_kept_adapter_that_finds_no_memory_comes_to_the_device_later(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = start_engine(start, "llama")

    def none_left(*_: object) -> None:
        raise gpu_memory()

    monkeypatch.setattr(engine.ia3, "fill_slot", none_left)
    with engine.registry.lease("default") as lease:
        engine.registry.residency.keep("default", lease.vectors)
        engine.engine.wake()
        assert engine.ask([5]).finish is FinishReason.LENGTH
        assert not engine.registry.residency.is_resident(lease)
        monkeypatch.undo()
        assert engine.ask([5]).finish is FinishReason.LENGTH
        assert engine.registry.residency.is_resident(lease)
        engine.registry.residency.stop_keeping(lease.vectors)
    engine.assert_idle()


def test_a_lost_device_ends_the_engine_rather_than_every_request_one_by_one(
    start: Callable[..., Harness],
) -> None:
    base, engine = start_engine(start, "llama")
    lost = torch.AcceleratorError("CUDA error: device-side assert triggered")
    with engine.held():
        engine.submit("runs", [5], max_tokens=50)
    with Faulty(lambda _: True, lost).of(base):
        engine.wait()

    assert engine.answers["runs"].finish is FinishReason.ENGINE_DEAD
    assert not engine.engine.stats().ready
    engine.assert_idle()


def test_a_tokenizer_that_fails_ends_only_the_request_whose_token_it_was(
    start: Callable[..., Harness], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = start_engine(start, "llama")
    push = Detokenizer.push
    broken: list[Detokenizer] = []

    def fails_for_the_first(
        self: Detokenizer, token: int, may_stop: bool = True
    ) -> tuple[str, bool]:
        broken.append(self)
        if self is broken[0]:
            raise ValueError("no such token")
        return push(self, token, may_stop)

    with engine.held():
        engine.submit("fails", [5], max_tokens=3)
        engine.submit("runs", [5], max_tokens=3)
        monkeypatch.setattr(Detokenizer, "push", fails_for_the_first)
    engine.wait()

    assert sorted(engine.answers[name].finish for name in ("fails", "runs")) == ["error", "length"]
    engine.assert_idle()
