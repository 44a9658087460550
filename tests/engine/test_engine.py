"""Each request ends exactly once, and gives back what it held."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model

from infuse.server.engine import EngineDead, EngineStopping, FinishReason, QueueFull
from infuse.server.engine.request import token_mask
from tests.engine.harness import Harness, Oracle
from tests.factories import TOKENS, run_by_modules, tiny_model


def test_a_cancelled_request_ends_at_once_and_the_others_go_on(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    alone = engine.ask([5, 6], "default", max_tokens=40).tokens
    with engine.held():
        engine.submit("leaves", [7, 8], "queries", max_tokens=200)
        engine.submit("stays", [5, 6], "default", max_tokens=40)
    while not engine.answers["leaves"].tokens:
        engine.read()
    engine.engine.cancel("leaves")
    engine.wait()

    assert engine.answers["leaves"].finish is FinishReason.CANCELLED
    assert len(engine.answers["leaves"].tokens) < 200
    assert engine.answers["stays"].tokens == alone
    engine.assert_idle()


def test_a_waiting_request_can_be_cancelled(start: Callable[..., Harness]) -> None:
    engine = start(max_rows=1)
    with engine.held():
        engine.submit("runs", [5], max_tokens=20)
        engine.submit("waits", [6], "default", max_tokens=20)
        engine.engine.cancel("waits")
    engine.wait()

    assert engine.answers["waits"].finish is FinishReason.CANCELLED
    assert engine.answers["waits"].tokens == []
    assert len(engine.answers["runs"].tokens) == 20
    engine.assert_idle()


def test_cancelling_what_has_ended_or_never_was_does_nothing(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    engine.submit("ended", [5])
    engine.wait()
    engine.engine.cancel("ended")
    engine.engine.cancel("nobody")

    assert engine.ask([5], max_tokens=3).finish is FinishReason.LENGTH
    engine.assert_idle()


def test_a_full_queue_refuses_and_says_when_to_come_back(start: Callable[..., Harness]) -> None:
    engine = start(max_rows=1, max_queue=2)
    with engine.held():  # by a request of its own
        for number in range(2):
            engine.submit(str(number), [5], "default")
        with pytest.raises(QueueFull, match="try again in") as refusal:
            engine.submit("late", [5], "default")
    engine.wait()

    assert 1 <= refusal.value.retry_after <= 60
    engine.assert_idle()


def test_stop_lets_running_requests_end_and_refuses_new_ones(
    start: Callable[..., Harness],
) -> None:
    engine = start()
    engine.submit("runs", [5], "default", max_tokens=100)
    engine.engine.stop(timeout=60)
    engine.wait()

    assert engine.answers["runs"].finish is FinishReason.LENGTH
    with pytest.raises(EngineStopping):
        engine.submit("late", [5])
    engine.assert_idle()


def test_stop_cancels_what_does_not_end_in_time(start: Callable[..., Harness]) -> None:
    engine = start(max_rows=1)
    engine.submit("runs", [5], "default", max_tokens=250)
    engine.submit("waits", [5], max_tokens=250)
    engine.engine.stop(timeout=0)
    engine.wait()

    assert engine.answers["runs"].finish is FinishReason.CANCELLED
    assert engine.answers["waits"].finish is FinishReason.CANCELLED
    engine.assert_idle()


def test_a_failing_step_ends_its_own_requests_and_no_others(
    start: Callable[..., Harness],
) -> None:
    base = run_by_modules(tiny_model("llama"))
    engine = start(base)
    with engine.held():
        engine.submit("fails", [5], "default", max_tokens=50)
        handle = base.register_forward_pre_hook(_out_of_memory)
    engine.wait()
    handle.remove()

    assert engine.answers["fails"].finish is FinishReason.ERROR
    assert "not enough memory" in engine.answers["fails"].error
    assert engine.ask([5], "default").finish is FinishReason.LENGTH
    engine.assert_idle()


def _out_of_memory(*_: object) -> None:
    raise RuntimeError("not enough memory")


def test_a_dead_model_thread_fails_every_request_and_says_so(
    start: Callable[..., Harness],
) -> None:
    base = run_by_modules(tiny_model("llama"))
    engine = start(base)
    with engine.held():
        engine.submit("fails", [5], "default", max_tokens=50)
        base.register_forward_pre_hook(_impossible)
    engine.wait()

    assert engine.answers["fails"].finish is FinishReason.ENGINE_DEAD
    assert not engine.engine.stats().ready
    with pytest.raises(EngineDead):
        engine.submit("late", [5])
    engine.assert_idle()


def _impossible(*_: object) -> None:
    raise AssertionError("a broken invariant")


def test_an_adapter_whose_output_overflows_ends_its_own_row_only(
    start: Callable[..., Harness], tmp_path: Path
) -> None:
    base = tiny_model("llama")
    peft = get_peft_model(
        base,
        IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj"], feedforward_modules=[]),
    )
    for name, parameter in peft.named_parameters():
        if "ia3_l" in name:
            torch.nn.init.constant_(parameter, 3e38)
    peft.save_pretrained(tmp_path / "huge")
    engine = start()
    engine.add("huge", tmp_path / "huge")
    alone = engine.ask([5, 6], "default").tokens
    with engine.held():
        engine.submit("huge", [5, 6, 7], "huge")
        engine.submit("sane", [5, 6], "default")
    engine.wait()

    assert engine.answers["huge"].finish is FinishReason.ERROR
    assert "not finite" in engine.answers["huge"].error
    assert engine.answers["sane"].tokens == alone
    engine.assert_idle()


def test_a_request_of_higher_priority_is_served_first(start: Callable[..., Harness]) -> None:
    engine = start(max_rows=1)
    with engine.held():
        engine.submit("usual", [5], priority=0)
        engine.submit("patient", [5], priority=5)
        engine.submit("urgent", [5], priority=-5)
    order: list[str] = []
    while len(order) < 3:
        engine.read()
        order += [n for n, a in engine.answers.items() if a.finish and n not in order]

    assert order == ["urgent", "usual", "patient"]


def test_end_tokens_stop_unless_they_are_ignored(start: Callable[..., Harness]) -> None:
    engine = start()
    ends = {"logit_bias": {2: 100.0}}

    stopped = engine.ask([5], max_tokens=5, ignore_eos=False, **ends)
    assert (stopped.tokens, stopped.finish, stopped.text) == ([2], FinishReason.STOP, "")
    assert engine.ask([5], max_tokens=5, **ends).finish is FinishReason.LENGTH
    own = engine.ask([5], max_tokens=5, logit_bias={9: 100.0}, stop_token_ids=frozenset({9}))
    assert (own.tokens, own.finish) == ([9], FinishReason.STOP)


def test_min_tokens_holds_ends_back(start: Callable[..., Harness]) -> None:
    ends = {"logit_bias": {2: 100.0}}
    answer = start().ask([5], max_tokens=9, min_tokens=4, ignore_eos=False, **ends)

    assert len(answer.tokens) == 5
    assert answer.tokens.index(2) == 4


def test_a_stop_string_ends_the_text_before_itself(start: Callable[..., Harness]) -> None:
    engine = start()
    whole = engine.ask([5, 6], max_tokens=20)
    stop = whole.text[3:5]
    answer = engine.ask([5, 6], max_tokens=20, stop=(stop,))

    assert answer.finish is FinishReason.STOP
    assert answer.text == whole.text[: whole.text.index(stop)]


def test_prompt_logprobs_are_the_models_own_over_any_number_of_chunks(
    start: Callable[..., Harness],
) -> None:
    base = tiny_model("llama")
    oracle = Oracle(base)
    engine = start(base, prefill_chunk_tokens=4)
    prompt = list(range(5, 20))
    answer = engine.ask(prompt, max_tokens=0, prompt_logprobs=2)

    exact = oracle.logits(prompt).log_softmax(-1)
    assert answer.tokens == []
    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None
    for position, scored in enumerate(answer.prompt_logprobs[1:]):
        assert scored is not None
        assert scored.token_id == prompt[position + 1]
        assert scored.logprob == pytest.approx(exact[position, scored.token_id].item(), abs=1e-4)
        best = exact[position].topk(2).indices.tolist()
        assert [token for token, _ in scored.top] == best


def test_a_seed_gives_the_same_text_in_any_company(start: Callable[..., Harness]) -> None:
    engine = start()
    drawn = {"temperature": 1.5, "seed": 11, "max_tokens": 12}
    alone = engine.ask([5, 6], "default", **drawn).tokens
    with engine.held():
        engine.submit("again", [5, 6], "default", **drawn)
        for number in range(6):
            engine.submit(str(number), [7, 8], temperature=1.0)
    engine.wait()

    assert engine.answers["again"].tokens == alone
    assert engine.ask([5, 6], "default", **drawn | {"seed": 12}).tokens != alone


def test_stats_count_what_was_computed(start: Callable[..., Harness]) -> None:
    engine = start(kv_cache_tokens=1024)
    engine.ask(list(range(5, 15)), max_tokens=7)
    stats = engine.engine.stats()

    assert (stats.prompt_tokens, stats.generated_tokens) == (10, 7)
    assert stats.kv_tokens_total == 1024
    assert stats.ready
    assert stats.steps == 7


def test_a_prompt_may_fill_the_window(start: Callable[..., Harness]) -> None:
    prompt = [5 + n % (TOKENS - 5) for n in range(255)]

    assert start().ask(prompt, "default", max_tokens=1).finish is FinishReason.LENGTH


def test_min_tokens_holds_stop_strings_back(start: Callable[..., Harness]) -> None:
    engine = start()
    letters = {"logit_bias": {70: 100.0}, "max_tokens": 9}
    letter = engine.ask([5], **letters).text[0]

    assert engine.ask([5], **letters, stop=(letter,)).text == ""
    late = engine.ask([5], **letters, stop=(letter,), min_tokens=4)
    longer = engine.ask([5], **letters, stop=(letter * 3,), min_tokens=4)

    assert (late.text, len(late.tokens)) == (letter * 4, 5)
    assert (longer.text, len(longer.tokens)) == (letter * 2, 5)
    assert late.finish is longer.finish is FinishReason.STOP


def test_an_ignored_end_token_is_no_end_that_min_tokens_holds_back(
    start: Callable[..., Harness],
) -> None:
    ends = {"logit_bias": {2: 100.0}}

    assert start().ask([5], max_tokens=4, min_tokens=4, ignore_eos=True, **ends).tokens == [2] * 4


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_come(start: Callable[..., Harness], temperature: float) -> None:
    engine = start()
    with engine.held():
        for name, allowed in (("two", {70, 71}), ("one", {72}), ("all", None)):
            mask = None if allowed is None else token_mask(allowed)
            params = {"temperature": temperature, "seed": 1, "allowed_tokens": mask}
            engine.submit(name, [5], max_tokens=24, **params)
    engine.wait()

    assert set(engine.answers["two"].tokens) <= {70, 71}
    assert engine.answers["one"].tokens == [72] * 24
    assert len(set(engine.answers["all"].tokens)) > 2


def test_bad_words_never_come(start: Callable[..., Harness]) -> None:
    engine = start()
    likely = {"logit_bias": {70: 60.0, 71: 59.0, 72: 58.0}, "max_tokens": 12}

    def ask(*words: tuple[int, ...], **more: Any) -> list[int]:
        return engine.ask([70], **likely, **more, bad_words=words).tokens

    assert ask() == [70] * 12
    assert ask((70,)) == [71] * 12
    assert ask((70, 70)) == [70, 71] * 6
    # The prompt's own 70 is not part of the answer.
    assert ask((70, 70, 70), (70, 70, 71), (70, 70, 72))[:2] == [70, 70]
    assert ask((70,), (71, 71)) == [71, 72] * 6
    # Where nothing else is allowed, they come after all.
    assert ask((70,), allowed_tokens=token_mask({70})) == [70] * 12


def test_bad_words_hold_beside_drafts(start: Callable[..., Harness]) -> None:
    engine = start(speculation=True)
    params = {"logit_bias": {70: 60.0, 71: 59.0}, "max_tokens": 40}

    assert engine.ask([70, 71] * 9, **params, bad_words=((70, 70),)).tokens == [70, 71] * 20
    allowed = engine.ask([70, 71] * 9, max_tokens=40, allowed_tokens=token_mask({71})).tokens
    assert allowed == [71] * 40
