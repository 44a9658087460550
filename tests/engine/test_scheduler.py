"""Laws of the scheduler, under any mix of requests, on a real cache and a real registry."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from adapters.model import IA3Model
from adapters.registry import AdapterRegistry
from adapters.store import AdapterStore
from server.engine.attention import LayerShape
from server.engine.kv_cache import StripCache
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import Scheduler, Step
from server.engine.sequence import Sequence
from tests.factories import tiny_tokenizer

WINDOW = 256
ROWS, CHUNK, SLOTS = 4, 32, 2
ADAPTERS = ("default", "regex", "queries")
TOKENIZER = tiny_tokenizer()


@dataclass(frozen=True)
class Ask:
    prompt: int
    answer: int
    adapter: str | None
    priority: int


asks = st.builds(
    Ask,
    prompt=st.integers(1, 150),
    answer=st.integers(1, 100),
    adapter=st.sampled_from([None, *ADAPTERS]),
    priority=st.integers(-2, 2),
)


@pytest.fixture(scope="module")
def registry(
    llama: PreTrainedModel, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AdapterRegistry]:
    store = AdapterStore(tmp_path_factory.mktemp("store"))
    ia3 = IA3Model(llama, SLOTS)
    registry = AdapterRegistry(store, ia3.modules_of_base, ia3)
    for name in ADAPTERS:
        with store.staging() as staged:
            for file in adapters[name].iterdir():
                (staged / file.name).write_bytes(file.read_bytes())
            registry.add(name, staged)
    yield registry
    ia3.unload()
    store.close()


class Machine:
    """Runs whatever the scheduler says, without a model: every step computes and takes a token."""

    def __init__(self, registry: AdapterRegistry) -> None:
        self.registry = registry
        shapes = [LayerShape(1, 4, 4, torch.float32)]
        self.cache = StripCache(shapes, 2 * WINDOW, WINDOW)
        self.scheduler = Scheduler(self.cache, registry.residency, ROWS, CHUNK)
        self.finished: list[int] = []
        self.row = 0

    def add(self, ask: Ask) -> None:
        lease = None if ask.adapter is None else self.registry.lease(ask.adapter)
        request = GenerationRequest(
            id=str(self.row),
            prompt=(5,) * ask.prompt,
            params=SamplingParams(max_tokens=ask.answer),
            lease=lease,
            priority=ask.priority,
        )
        self.scheduler.add(Sequence(request, self.row, TOKENIZER))
        self.row += 1

    def step(self) -> Step:
        step = self.scheduler.schedule()
        for sequence, tokens in [*((s, 1) for s in step.decode), *step.prefill]:
            sequence.computed += tokens
            if sequence.uncomputed == 0:
                sequence.tokens.append(6)
                if sequence.answer_tokens == sequence.request.params.max_tokens:
                    self.finish(sequence)
        return step

    def finish(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        if sequence.request.lease is not None:
            sequence.request.lease.release()
        self.finished.append(sequence.row)

    def check(self, step: Step, running: list[Sequence]) -> None:
        assert len(running) <= ROWS
        assert self.cache.used_tokens <= self.cache.total_tokens
        assert sum(tokens for _, tokens in step.prefill) <= CHUNK
        assert {s.row for s in step.decode}.isdisjoint(s.row for s, _ in step.prefill)
        slots = {s.slot for s in running if s.request.lease is not None}
        assert len(slots - {None}) <= SLOTS
        assert self.registry.stats().pinned <= len(slots)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=st.lists(st.lists(asks, max_size=4), min_size=1, max_size=12))
def test_every_request_ends_and_gives_back_what_it_held(
    registry: AdapterRegistry, arrivals: list[list[Ask]]
) -> None:
    """No starvation, no leak, never idle while somebody waits."""
    machine = Machine(registry)
    for burst in arrivals:
        for ask in burst:
            machine.add(ask)
        waiting_before = list(machine.scheduler)
        step = machine.step()
        assert bool(step) == bool(waiting_before)
        machine.check(step, machine.scheduler.running)
    steps = 0
    while list(machine.scheduler):
        machine.check(machine.step(), machine.scheduler.running)
        steps += 1
        assert steps < 20_000, "the scheduler turns in a circle"

    assert sorted(machine.finished) == list(range(machine.row))
    assert machine.cache.used_tokens == 0
    assert (registry.stats().leases, registry.stats().pinned) == (0, 0)


def test_decoding_rows_go_on_while_a_long_prompt_is_computed(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    machine.add(Ask(prompt=1, answer=50, adapter=None, priority=0))
    machine.step()
    machine.add(Ask(prompt=150, answer=1, adapter="default", priority=0))
    steps = [machine.step() for _ in range(5)]

    assert all(len(step.decode) == 1 for step in steps)
    assert [tokens for step in steps for _, tokens in step.prefill] == [32, 32, 32, 32, 22]


def test_a_waiting_request_holds_no_slot(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    for adapter in ADAPTERS:
        machine.add(Ask(prompt=1, answer=3, adapter=adapter, priority=0))
    machine.step()

    assert len(machine.scheduler.running) == SLOTS
    assert machine.scheduler.waiting == 1
    assert (registry.stats().pinned, registry.stats().leases) == (SLOTS, 3)
    while list(machine.scheduler):
        machine.step()


def test_the_lowest_in_rank_give_way_and_come_back(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    for priority in (1, 0, 0, 0):
        machine.add(Ask(prompt=60, answer=100, adapter=None, priority=priority))
    while not machine.scheduler.preemptions:
        machine.step()
    waiting = [s for s in machine.scheduler if s not in machine.scheduler.running]

    assert [s.row for s in machine.scheduler.running] == [1, 2]
    assert sorted(s.row for s in waiting) == [0, 3]
    assert all(s.computed == 0 and s.answer_tokens > 0 for s in waiting)
    while list(machine.scheduler):
        machine.step()
    assert machine.finished == [1, 2, 3, 0]
