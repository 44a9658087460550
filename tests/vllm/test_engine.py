"""A request's life in the vLLM engine: it ends exactly once, with its own adapter's answer."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import PreTrainedModel

from infuse.adapters.registry import Part
from infuse.adapters.storage.revision import DetailsChange
from infuse.server.engine import (
    EngineDead,
    EngineStopping,
    FinishReason,
    QueueFull,
    UnsupportedModel,
)
from infuse.server.engine.request import token_mask
from tests.adapters.oracle import peft_logits
from tests.engine.family_oracle import FamilyOracle
from tests.factories import tiny_tokenizer
from tests.vllm.families import weakened
from tests.vllm.harness import BLOCK, VllmHarness, vllm_processes

LONG = [5 + 7 * number % 250 for number in range(3 * BLOCK + 5)]
"""A prompt of three blocks of the prefix cache and a bit."""
LETTERS = tiny_tokenizer().encode("abcdefghijklmnopqrstuvwxyz")
ONLY_LETTERS = token_mask(LETTERS)
END = 2


def greedy(base: PreTrainedModel, prompt: list[int], count: int, *folders: Path) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(peft_logits(base, torch.tensor([ids]), *folders)[0, -1].argmax()))
    return ids[len(prompt) :]


def test_a_cancelled_request_ends_at_once_and_the_others_go_on(engine: VllmHarness) -> None:
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


def test_a_request_can_be_cancelled_before_it_has_started(engine: VllmHarness) -> None:
    engine.submit("leaves", [5], "default", max_tokens=200)
    engine.engine.cancel("leaves")
    engine.wait()

    assert engine.answers["leaves"].finish is FinishReason.CANCELLED


def test_what_waits_within_vllm_is_not_said_to_run(engine: VllmHarness) -> None:
    """vLLM is given a quarter more than its batch has rows."""
    seen = []
    for number in range(80):
        engine.submit(str(number), [5 + number], max_tokens=50)
    while any(answer.finish is None for answer in engine.answers.values()):
        seen.append(engine.engine.in_flight())
        engine.read()

    assert max(sum(each.is_running for each in now) for now in seen) <= 40
    assert all(each.started is None for now in seen for each in now if not each.is_running)


def test_a_waiting_request_can_be_cancelled(engine: VllmHarness) -> None:
    with engine.held():
        for number in range(60):  # More than vLLM is given at once.
            engine.submit(str(number), [5 + number], max_tokens=20)
        engine.submit("waits", [5], "default", max_tokens=20)
        engine.engine.cancel("waits")
    engine.wait()

    assert engine.answers["waits"].finish is FinishReason.CANCELLED
    assert engine.answers["waits"].tokens == []
    assert all(len(engine.answers[str(number)].tokens) == 20 for number in range(60))


def test_cancelling_what_has_ended_or_never_was_does_nothing(engine: VllmHarness) -> None:
    engine.submit("ended", [5])
    engine.wait()
    engine.engine.cancel("ended")
    engine.engine.cancel("nobody")

    assert engine.ask([5], max_tokens=3).finish is FinishReason.LENGTH


def test_a_full_queue_refuses_and_says_when_to_come_back(engine: VllmHarness) -> None:
    with engine.held():
        for number in range(40 + 256):  # The rows of a batch, and the queue.
            engine.submit(str(number), [5], max_tokens=1)
        with pytest.raises(QueueFull, match="try again in"):
            engine.submit("late", [5])


def test_more_adapters_than_slots_wait_and_get_their_own_answers(
    engine: VllmHarness, llama: PreTrainedModel, adapters: dict[str, Path], tmp_path: Path
) -> None:
    strengths = [number / 20 for number in range(1, 31)]
    leases = [engine.registry.lease_mixture([Part("regex", s)], "product") for s in strengths]
    with engine.held():
        for strength, lease in zip(strengths, leases, strict=True):
            engine.submit(str(strength), LONG, lease)
    engine.wait()

    assert engine.registry.stats().resident <= engine.registry.residency.capacity < len(strengths)
    for strength in strengths:
        folder = weakened(adapters["regex"], tmp_path / str(strength), strength)
        oracle = FamilyOracle(llama, [folder])
        oracle.assert_answered(engine, {str(strength): LONG})


def test_a_slot_is_filled_anew_while_other_requests_run(engine: VllmHarness) -> None:
    kinds = ("default", "queries", "mlp-inward")
    alone = {kind: engine.ask([5, 6], kind, max_tokens=150).tokens for kind in kinds}
    swaps = engine.registry.stats().swaps
    for kind in kinds:
        engine.submit(kind, [5, 6], kind, max_tokens=150)
    for number in range(20):
        lease = engine.registry.lease_mixture([Part("second", 2 + number)], "product")
        engine.submit("short", [7], lease, max_tokens=1)
        engine.wait("short")
    still_ran = engine.answers["default"].finish is None
    engine.wait()

    assert still_ran
    assert engine.registry.stats().swaps >= swaps + 20
    assert {kind: engine.answers[kind].tokens for kind in kinds} == alone


def test_a_pinned_adapter_gets_a_slot_as_soon_as_one_is_free(engine: VllmHarness) -> None:
    registry, name = engine.registry, "attention-output"
    with engine.held():
        for number in range(registry.residency.capacity):
            lease = registry.lease_mixture([Part("regex", -1 - number)], "product")
            engine.submit(str(number), [5], lease)
        registry.describe(name, DetailsChange(pinned=True))
        engine.engine.wake()
    engine.wait()

    with registry.lease(name) as lease:
        assert registry.residency.is_resident(lease)
    registry.describe(name, DetailsChange(pinned=False))


def test_adapters_share_no_cached_prompt_unless_their_content_is_equal(
    engine: VllmHarness, llama: PreTrainedModel, adapters: dict[str, Path]
) -> None:
    engine.add("queries-again", adapters["queries"])
    engine.ask(LONG)
    prompt = [*LONG, 9]  # The last block is never whole.
    first, other = engine.ask(prompt, "queries"), engine.ask(prompt, "mlp-outward")
    equal, salted = engine.ask(prompt, "queries-again"), engine.ask(prompt, cache_salt="other")
    again = engine.ask(prompt)

    assert [each.cached for each in (first, other, equal, salted, again)] == [
        0,
        0,
        3 * BLOCK,
        0,
        3 * BLOCK,
    ]
    assert equal.tokens == first.tokens == greedy(llama, prompt, 8, adapters["queries"])
    assert other.tokens == greedy(llama, prompt, 8, adapters["mlp-outward"])
    assert again.tokens == salted.tokens == greedy(llama, prompt, 8)


def test_a_stop_string_ends_an_answer_before_it(engine: VllmHarness) -> None:
    whole = engine.ask(LONG, max_tokens=20, allowed_tokens=ONLY_LETTERS)
    stop = whole.text[9:12]
    before = whole.text[: whole.text.index(stop)]
    params = {"max_tokens": 20, "allowed_tokens": ONLY_LETTERS, "stop": (stop,)}

    stopped = engine.ask(LONG, **params)
    assert (stopped.text, stopped.finish) == (before, FinishReason.STOP)
    assert engine.ask(LONG, **params, include_stop=True).text == before + stop
    assert engine.ask(LONG, **params, min_tokens=20).text == whole.text


def test_a_stop_token_ends_an_answer(engine: VllmHarness) -> None:
    whole = engine.ask(LONG, max_tokens=20).tokens
    ends = {"stop_token_ids": frozenset({whole[6]})}

    stopped = engine.ask(LONG, max_tokens=20, **ends)
    assert stopped.tokens == whole[: whole.index(whole[6]) + 1]
    assert stopped.finish is FinishReason.STOP
    kept = engine.ask(LONG, max_tokens=20, min_tokens=12, **ends)
    assert whole[6] not in kept.tokens[:12]


def test_the_models_end_token_ends_an_answer_unless_it_is_ignored(engine: VllmHarness) -> None:
    likely = {"logit_bias": {END: 100.0}}

    assert engine.ask(LONG, ignore_eos=False, **likely).finish is FinishReason.STOP
    assert engine.ask(LONG, ignore_eos=True, **likely).tokens == [END] * 8
    late = engine.ask(LONG, ignore_eos=False, min_tokens=4, **likely).tokens
    assert (late.index(END), len(late)) == (4, 5)


def test_scores_are_the_models_log_probabilities(
    engine: VllmHarness, llama: PreTrainedModel, adapters: dict[str, Path]
) -> None:
    prompt = LONG[:40]
    answer = engine.ask(prompt, "regex", logprobs=3, prompt_logprobs=2, temperature=0.5, seed=1)
    ids = torch.tensor([[*prompt, *answer.tokens]])
    wanted = peft_logits(llama, ids, adapters["regex"])[0].log_softmax(-1)

    assert answer.prompt_logprobs is not None
    assert answer.prompt_logprobs[0] is None
    scored = [*answer.prompt_logprobs[1:], *answer.logprobs]
    for position, each in enumerate(scored):
        assert each is not None
        assert each.token_id == ids[0, position + 1]
        assert each.logprob == pytest.approx(wanted[position, each.token_id].item(), abs=1e-4)
        count = 2 if position < len(prompt) - 1 else 3
        best = wanted[position].topk(count)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [value for _, value in each.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_is_scored_from_where_it_is_asked(engine: VllmHarness) -> None:
    whole = engine.ask(LONG, "regex", prompt_logprobs=0).prompt_logprobs
    part = engine.ask(LONG, "regex", prompt_logprobs=0, prompt_logprobs_from=50).prompt_logprobs

    assert whole is not None
    assert part is not None
    assert list(part[:50]) == [None] * 50
    assert [each.logprob for each in part[50:]] == pytest.approx(
        [each.logprob for each in whole[50:]], abs=1e-4
    )


def test_a_prompt_can_be_scored_without_an_answer(engine: VllmHarness) -> None:
    answer = engine.ask(LONG, max_tokens=0, prompt_logprobs=1)

    assert (answer.tokens, answer.text, answer.finish) == ([], "", FinishReason.LENGTH)
    assert answer.prompt_logprobs is not None
    assert len(answer.prompt_logprobs) == len(LONG)


def test_tokens_can_be_biased_allowed_and_forbidden(engine: VllmHarness) -> None:
    first, second = engine.ask(LONG).tokens[:2]

    assert engine.ask(LONG, logit_bias={7: 100.0}).tokens == [7] * 8
    assert set(engine.ask(LONG, allowed_tokens=ONLY_LETTERS).tokens) <= set(LETTERS)
    assert engine.ask(LONG, bad_words=((first,),)).tokens[0] != first
    split = engine.ask(LONG, bad_words=((first, second),)).tokens
    assert split[0] == first
    assert split[1] != second


def test_an_equal_seed_gives_an_equal_answer(engine: VllmHarness) -> None:
    with engine.held():
        for name, seed in {"one": 1, "one again": 1, "two": 2}.items():
            engine.submit(name, LONG, "default", temperature=1.0, seed=seed, max_tokens=20)
    engine.wait()
    answers = {name: answer.tokens for name, answer in engine.answers.items()}

    assert answers["one"] == answers["one again"]
    assert answers["one"] != answers["two"]


@pytest.mark.parametrize(
    ("kind", "source", "matches"),
    [
        (
            "json",
            {
                "type": "object",
                "properties": {"age": {"enum": [1, 22, 333]}},
                "required": ["age"],
                "additionalProperties": False,
            },
            lambda text: json.loads(text)["age"] in (1, 22, 333),
        ),
        ("regex", "(yes|no), [a-c]{3}", re.compile("(yes|no), [a-c]{3}").fullmatch),
        ("choice", ["red", "green"], ["red", "green"].__contains__),
        ("grammar", 'start: "x" num\nnum: /[0-9]{2}/', re.compile("x[0-9]{2}").fullmatch),
    ],
    ids=["json", "regex", "choice", "lark"],
)
def test_an_answer_matches_its_grammar(
    engine: VllmHarness, kind: str, source: object, matches: Callable[[str], object]
) -> None:
    grammar = engine.engine.grammars.compile(kind, source, "the grammar")  # type: ignore[arg-type]
    with engine.held():
        for adapter in (None, "default", "mlp-inward"):
            engine.submit(str(adapter), [5], adapter, max_tokens=60, grammar=grammar)
        engine.submit("free", [5], max_tokens=8)
    engine.wait()

    assert engine.answers.pop("free").finish is FinishReason.LENGTH
    for answer in engine.answers.values():
        assert answer.finish is FinishReason.STOP
        assert matches(answer.text), answer.text


@pytest.fixture
def own_engine(
    start: Callable[..., VllmHarness], llama: PreTrainedModel, adapters: dict[str, Path]
) -> VllmHarness:
    """An engine that a test may end. It has one slot, and starts sooner without compiling."""
    return start(llama, adapters, max_adapters=1, options={"enforce_eager": True})


def test_stop_cancels_what_does_not_end_in_time_and_leaves_no_process(
    own_engine: VllmHarness,
) -> None:
    engine = own_engine
    processes = engine.processes()
    engine.submit("runs", [5], "default", max_tokens=250)
    engine.submit("waits", [5], "queries", max_tokens=250)
    engine.engine.stop(timeout=0)
    engine.wait()

    assert engine.answers["runs"].finish is FinishReason.CANCELLED
    assert engine.answers["waits"].finish is FinishReason.CANCELLED
    with pytest.raises(EngineStopping):
        engine.submit("late", [5])
    assert processes
    assert psutil.wait_procs(processes, timeout=30)[1] == []
    engine.assert_idle()


def test_when_vllms_process_is_killed_every_request_ends_and_says_so(
    own_engine: VllmHarness,
) -> None:
    engine = own_engine
    core = next(each for each in engine.processes() if "EngineCore" in each.name())
    processes = engine.processes()
    engine.submit("runs", [5], "default", max_tokens=250)
    engine.submit("waits for the slot", [5], "queries", max_tokens=250)
    while not engine.answers["runs"].tokens:
        engine.read()
    core.kill()
    engine.wait()

    assert {each.finish for each in engine.answers.values()} == {FinishReason.ENGINE_DEAD}
    stats = engine.engine.stats()
    assert (stats.alive, stats.ready) == (False, False)
    with pytest.raises(EngineDead):
        engine.submit("late", [5], "default")
    engine.assert_idle()
    assert psutil.wait_procs(processes, timeout=30)[1] == []


def test_when_vllms_process_is_killed_while_a_slot_is_filled_the_request_ends(
    own_engine: VllmHarness,
) -> None:
    engine = own_engine
    core = next(each for each in engine.processes() if "EngineCore" in each.name())
    core.suspend()
    engine.submit("waits for its vectors", [5], "default")
    engine.submit("waits for the slot", [5], "queries")
    core.kill()
    engine.wait()

    assert {each.finish for each in engine.answers.values()} == {FinishReason.ENGINE_DEAD}
    engine.assert_idle()


@pytest.mark.parametrize("name", ["EngineCore", "Worker"])
def test_when_a_process_of_vllm_hangs_it_is_killed_and_every_request_says_so(
    start: Callable[..., VllmHarness], llama: PreTrainedModel, name: str
) -> None:
    engine = start(llama, {}, hang_timeout=5.0, options={"enforce_eager": True})
    processes = engine.processes()
    found = [each for each in processes if name in each.name()]
    if not found:
        pytest.skip("one process is both")
    engine.ask([5], max_tokens=2)
    engine.submit("runs", [5], max_tokens=250)
    while not engine.answers["runs"].tokens:
        engine.read()
    found[0].suspend()
    engine.wait()

    assert engine.answers["runs"].finish is FinishReason.ENGINE_DEAD
    assert not engine.engine.stats().alive
    engine.assert_idle()
    assert psutil.wait_procs(processes, timeout=30)[1] == []


_SERVER = """
import os, signal, sys
from pathlib import Path
from tests.vllm.families import wide
from tests.vllm.harness import VllmHarness

folder = Path(sys.argv[1])
engine = VllmHarness(wide("llama"), folder, {}, options={"enforce_eager": True})
(folder / "processes").write_text(" ".join(str(each.pid) for each in engine.processes()))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_when_the_server_is_killed_vllms_processes_end(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _SERVER, tmp_path], timeout=240)
    processes = (tmp_path / "processes").read_text().split()
    left = [psutil.Process(int(pid)) for pid in processes if psutil.pid_exists(int(pid))]

    assert processes
    assert psutil.wait_procs(left, timeout=30)[1] == []


@pytest.mark.full
def test_a_module_that_vllm_computes_without_a_layer_is_refused(
    start: Callable[..., VllmHarness], llama: PreTrainedModel
) -> None:
    others = vllm_processes()
    with pytest.raises(UnsupportedModel, match=r"1 of the modules .*lm_head among them"):
        start(llama, {}, targets="k_proj,lm_head", options={"enforce_eager": True})
    assert vllm_processes() == others
