"""Laws of the scheduler, under any mix of orders, on a real cache and a real registry."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from infuse.adapters.model.slots import IA3Slots
from infuse.adapters.registry import AdapterRegistry
from infuse.adapters.storage.store import AdapterStore
from infuse.server.engine.native.attention import LayerShape
from infuse.server.engine.native.cache.kv_cache import StripCache
from infuse.server.engine.native.scheduling.scheduler import AMONG_TENANTS, Scheduler
from infuse.server.engine.native.sequences.sequence import Sequence
from infuse.server.engine.native.sequences.step import Step
from infuse.server.engine.request import GenerationRequest, SamplingParams, WaitsFor
from tests.factories import tiny_tokenizer

WINDOW = 256
ROWS, CHUNK, SLOTS = 4, 32, 2
ADAPTERS = ("default", "regex", "queries")
TOKENIZER = tiny_tokenizer()


@dataclass(frozen=True)
class Ask:
    """An order of one request, or of several that have `prompt` tokens in common."""

    prompt: int
    answer: int
    adapter: str | None
    priority: int
    choices: tuple[int, ...] = (0,)
    """Tokens of each request beyond those."""
    tenant: str = ""


asks = st.builds(
    Ask,
    prompt=st.integers(1, 140),
    answer=st.integers(0, 100),
    adapter=st.sampled_from([None, *ADAPTERS]),
    priority=st.integers(-2, 2),
    choices=st.lists(st.integers(0, 15), min_size=1, max_size=5).map(tuple),
    tenant=st.sampled_from(["", "other"]),
)


@pytest.fixture(scope="module")
def registry(
    llama: PreTrainedModel, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AdapterRegistry]:
    store = AdapterStore(tmp_path_factory.mktemp("store"))
    ia3 = IA3Slots(llama, SLOTS)
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
    """Runs whatever the scheduler says, without a model: every step computes and takes a token.

    A token's key says the token and the adapter, so the cache says whether a row has its own keys.
    """

    def __init__(
        self,
        registry: AdapterRegistry,
        rows: int = ROWS,
        windows: int = 2,
        prefix_cache: bool = False,
    ) -> None:
        """The cache has room for so many windows."""
        self.registry = registry
        shapes = [LayerShape(1, 1, 1, torch.float32)]
        self.cache = StripCache(shapes, total_tokens=windows * WINDOW, max_tokens=WINDOW)
        self.scheduler = Scheduler(
            self.cache,
            registry.residency,
            max_rows=rows,
            chunk_tokens=CHUNK,
            prefix_cache=prefix_cache,
            now=lambda: self.seconds,
        )
        self.seconds = 0.0
        self.finished: list[int] = []
        self.computed = 0
        self.seq_id = 0

    def add(self, ask: Ask) -> list[Sequence]:
        added = []
        order = str(self.seq_id)
        for number, choice in enumerate(ask.choices):
            request = GenerationRequest(
                id=str(self.seq_id),
                prompt=(*((5,) * ask.prompt), *((6 + number,) * choice)),
                params=SamplingParams(max_tokens=ask.answer),
                lease=None if ask.adapter is None else self.registry.lease(ask.adapter),
                tenant=ask.tenant,
                priority=ask.priority,
                order=order,
            )
            added.append(Sequence(request, self.seq_id, TOKENIZER))
            self.scheduler.add(added[-1])
            self.seq_id += 1
        return added

    def step(self) -> Step:
        step = self.scheduler.schedule()
        for sequence, tokens in [*((s, 1) for s in step.decode), *step.prefill]:
            start, end = sequence.computed, sequence.computed + tokens
            self.keys(sequence)[start:end] = torch.tensor(self.expected(sequence)[start:end])
            sequence.advance(end - sequence.computed)
            self.computed += tokens
            if sequence.uncomputed == 0:
                if sequence.request.params.max_tokens > 0:
                    sequence.append(20 + sequence.seq_id)
                if sequence.answer_tokens == sequence.request.params.max_tokens:
                    self.finish(sequence)
        return step

    def expected(self, sequence: Sequence) -> list[int]:
        lease = sequence.request.lease
        adapter = 0 if lease is None else 1 + ADAPTERS.index(lease.label.partition("@")[0])
        return [1000 * adapter + token for token in sequence.tokens]

    def keys(self, sequence: Sequence) -> torch.Tensor:
        length, index = self.cache.strip_of(sequence.seq_id)
        return self.cache.keys(0, length)[index, 0, :, 0]

    def run(self) -> None:
        steps = 0
        while list(self.scheduler):
            self.check(self.step(), self.scheduler.running)
            steps += 1
            assert steps < 20_000, "the scheduler turns in a circle"

    def finish(self, sequence: Sequence) -> None:
        if sequence.computed:
            keys = self.keys(sequence)[: sequence.computed]
            assert keys.tolist() == self.expected(sequence)[: sequence.computed]
        self.scheduler.remove(sequence)
        if sequence.request.lease is not None:
            sequence.request.lease.release()
        self.finished.append(sequence.seq_id)

    def check(self, step: Step, running: list[Sequence]) -> None:
        assert len(running) <= ROWS
        assert self.cache.used_tokens <= self.cache.total_tokens
        assert sum(tokens for _, tokens in step.prefill) <= CHUNK
        assert {s.seq_id for s in step.decode}.isdisjoint(s.seq_id for s, _ in step.prefill)
        slots = {s.slot for s in running if s.request.lease is not None}
        assert len(slots - {None}) <= SLOTS
        assert self.registry.stats().pinned <= len(slots)


@pytest.mark.parametrize("prefix_cache", [True, False], ids=["prefix cache", "no prefix cache"])
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrivals=st.lists(
        st.tuples(st.lists(asks, max_size=4), st.one_of(st.none(), st.integers(0, 20))),
        min_size=1,
        max_size=12,
    )
)
def test_every_request_ends_and_gives_back_what_it_held(
    registry: AdapterRegistry,
    arrivals: list[tuple[list[Ask], int | None]],
    prefix_cache: bool,
) -> None:
    """No starvation, no leak, never idle while somebody waits, no row with keys of other tokens
    than its own; whoever is cancelled, leaders too."""
    machine = Machine(registry, prefix_cache=prefix_cache)
    for burst, cancelled in arrivals:
        for ask in burst:
            machine.add(ask)
        there = list(machine.scheduler)
        if there and cancelled is not None:
            machine.finish(there[cancelled % len(there)])
        waiting_before = list(machine.scheduler)
        step = machine.step()
        assert bool(step) == bool(waiting_before)
        machine.check(step, machine.scheduler.running)
    machine.run()

    assert sorted(machine.finished) == list(range(machine.seq_id))
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


def test_short_prompts_overtake_a_long_one_and_it_gets_on(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    [long] = machine.add(Ask(prompt=140, answer=1, adapter=None, priority=0))
    machine.step()
    [one] = machine.add(Ask(prompt=20, answer=1, adapter=None, priority=0))
    [other] = machine.add(Ask(prompt=30, answer=1, adapter=None, priority=0))

    least = CHUNK // 4
    assert machine.step().prefill == [(long, least), (one, 20), (other, CHUNK - least - 20)]
    assert machine.step().prefill == [(long, least), (other, CHUNK - least)]
    machine.run()


def test_long_prompts_get_few_tokens_of_a_step_while_tenants_share_the_model(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry)
    [long] = machine.add(Ask(prompt=140, answer=1, adapter=None, priority=0, tenant="a"))
    assert machine.step().prefill == [(long, CHUNK)]
    [short] = machine.add(Ask(prompt=8, answer=1, adapter=None, priority=0, tenant="b"))

    assert machine.step().prefill == [(long, 1), (short, 8)]
    few = CHUNK // AMONG_TENANTS
    assert machine.step().prefill == [(long, few)], "the other tenant may come back soon"
    machine.seconds += 11
    assert machine.step().prefill == [(long, CHUNK)]
    machine.run()


def test_steps_are_short_for_as_long_as_a_row_of_another_tenant_runs(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry)
    machine.add(Ask(prompt=1, answer=50, adapter=None, priority=0, tenant="a"))
    machine.step()
    machine.seconds += 11
    [long] = machine.add(Ask(prompt=140, answer=1, adapter=None, priority=0, tenant="b"))

    assert machine.step().prefill == [(long, CHUNK // AMONG_TENANTS)]
    machine.run()


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


def waits(machine: Machine, *sequences: Sequence) -> list[WaitsFor]:
    return [machine.scheduler.waits_for(each) for each in sequences]


def test_what_finds_no_slot_waits_for_one_and_what_is_behind_it_for_its_turn(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry)
    added = [machine.add(Ask(1, 3, name, 0))[0] for name in (*ADAPTERS, ADAPTERS[-1])]
    machine.step()

    assert waits(machine, *added[2:]) == [WaitsFor.SLOT, WaitsFor.TURN]
    machine.run()
    lacked, started = added[2].lacked_slot, added[2].started
    assert lacked is not None
    assert started is not None
    assert lacked <= started
    assert added[0].lacked_slot is added[1].lacked_slot is None


def test_what_finds_no_row_no_room_or_its_prefix_being_computed_waits_for_that(
    registry: AdapterRegistry,
) -> None:
    full, small, shared = Machine(registry, rows=1), Machine(registry), Machine(registry)
    _, row = (full.add(Ask(10, 3, None, 0))[0] for _ in range(2))
    _, _, blocks, behind = (small.add(Ask(120, 40, None, 0))[0] for _ in range(4))
    _, prefix = shared.add(Ask(100, 5, None, 0, choices=(1, 1)))
    for machine in (full, small, shared):
        machine.step()

    assert waits(full, row) == [WaitsFor.ROW]
    assert waits(small, blocks, behind) == [WaitsFor.BLOCKS, WaitsFor.TURN]
    assert waits(shared, prefix) == [WaitsFor.PREFIX]
    for machine in (full, small, shared):
        machine.run()


def test_the_lowest_in_rank_give_way_and_come_back(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    for priority in (1, 0, 0, 0):
        machine.add(Ask(prompt=60, answer=100, adapter=None, priority=priority))
    while not machine.scheduler.preemptions:
        machine.step()
    waiting = [s for s in machine.scheduler if s not in machine.scheduler.running]

    assert [s.seq_id for s in machine.scheduler.running] == [1, 2]
    assert sorted(s.seq_id for s in waiting) == [0, 3]
    assert all(s.computed == 0 and s.answer_tokens > 0 for s in waiting)
    while list(machine.scheduler):
        machine.step()
    assert machine.finished == [1, 2, 3, 0]


def test_what_an_order_has_in_common_is_computed_once(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    machine.add(Ask(prompt=100, answer=0, adapter="default", priority=0, choices=(3, 4, 5)))
    machine.run()

    assert machine.computed == 100 + 3 + 4 + 5
    assert machine.cache.used_tokens == 0


def test_others_go_first_while_a_leader_computes(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    leader, follower = machine.add(Ask(100, 5, None, 0, choices=(1, 1)))
    [other] = machine.add(Ask(10, 5, None, 0))
    machine.step()
    assert machine.scheduler.running == [leader, other]
    while leader.computed < 100:
        machine.step()
    machine.step()

    assert follower in machine.scheduler.running
    machine.run()


def test_followers_are_computed_before_prompts_that_came_later(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry, windows=3)
    leader, follower = machine.add(Ask(40, 1, None, 0, choices=(3, 3)))
    machine.add(Ask(140, 1, None, 0))
    while leader.computed < leader.prompt_tokens:
        machine.step()

    assert (follower, 3) in machine.step().prefill
    machine.run()


def test_followers_of_a_leader_that_is_cancelled_go_on_where_it_was(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry)
    leader, second, third = machine.add(Ask(100, 5, "default", 0, choices=(1, 1, 1)))
    machine.step()
    machine.finish(leader)
    machine.step()
    assert machine.scheduler.running == [second]
    machine.run()

    assert third.cached_tokens == 100
    assert machine.computed == CHUNK + (101 - CHUNK + 4) + (1 + 4)


def test_a_leader_that_ends_leaves_its_keys_to_those_who_wait_for_a_row(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry, rows=1)
    machine.add(Ask(100, 1, None, 0, choices=(1, 1, 1)))
    machine.run()

    assert machine.computed == 101 + 2 * 1


def test_keys_of_an_ended_leader_give_way_to_a_request_of_higher_rank(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry)
    leader, _ = machine.add(Ask(100, 1, None, priority=1, choices=(1, 1)))
    while leader.computed < 101:
        machine.step()
    for _ in range(2):
        machine.add(Ask(140, 100, None, priority=0))
    machine.step()
    assert [s.prompt_tokens for s in machine.scheduler.running] == [140, 140]
    machine.run()

    assert machine.computed == 2 * 101 + 2 * (140 + 99)


def test_keys_of_an_ended_leader_give_way_before_a_running_row(
    registry: AdapterRegistry,
) -> None:
    machine = Machine(registry)
    machine.add(Ask(65, 100, None, 0))
    machine.add(Ask(20, 100, None, 0))
    machine.add(Ask(100, 1, None, 1, choices=(1, 1)))
    machine.step()
    machine.add(Ask(200, 1, "queries", 1))  # waits for room, and the follower behind it
    machine.run()

    assert machine.scheduler.preemptions == 0
    assert machine.computed == (65 + 99) + (20 + 99) + 2 * 101 + 200


def test_a_leader_that_gave_way_is_followed_when_it_is_back(registry: AdapterRegistry) -> None:
    machine = Machine(registry)
    [grows] = machine.add(Ask(65, 100, None, 0))
    machine.add(Ask(20, 100, None, 0))
    while len(grows.tokens) < 127:
        machine.step()
    leader, _ = machine.add(Ask(140, 1, None, 1, choices=(1, 1)))
    lost = 0
    while not machine.scheduler.preemptions:
        lost = leader.computed
        machine.step()
    machine.run()

    assert lost > 0
    assert machine.computed == (65 + 99) + (20 + 99) + lost + 141 + 1
