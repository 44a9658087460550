"""Laws that hold for any traffic, and bounds that a queue in order of arrival would break."""

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from random import Random
from statistics import fmean, quantiles

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infuse.server.engine.fair_queue import FairQueue
from infuse.server.engine.native.scheduling import scheduler
from infuse.server.engine.native.sequences.sequence import Sequence
from tests.engine.simulation import Arrival, Journey, Simulation, worst_ttft

ROWS, LONGEST = 4, 250
UNIT = ROWS * LONGEST
"""Tokens that all rows together may have in hand: what turns are fair to."""
TENANTS, ADAPTERS = ("", "x", "y"), ("", "a", "b", "c")

arrivals = st.builds(
    Arrival,
    at=st.floats(0, 3),
    prompt=st.integers(1, 150),
    answer=st.integers(1, 100),
    adapter=st.sampled_from(ADAPTERS),
    tenant=st.sampled_from(TENANTS),
    priority=st.integers(-1, 1),
    patience=st.one_of(st.none(), st.floats(0, 5)),
)


class InOrderOfArrival(FairQueue[Sequence]):
    """What the bounds below are there to rule out."""

    def first(self, eligible: Callable[[Sequence], bool]) -> Sequence | None:
        return min(filter(eligible, self), key=lambda sequence: sequence.seq_id, default=None)


@pytest.fixture
def unfair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "FairQueue", InOrderOfArrival)


@settings(max_examples=40)
@given(st.lists(arrivals, max_size=40))
def test_whatever_comes_all_of_it_ends_and_nothing_is_left(traffic: list[Arrival]) -> None:
    """With a cache that rows outgrow, fewer slots than adapters, and clients that leave. The
    simulation asserts at every step that nothing idles, and that each request ends once."""
    Simulation(rows=ROWS, chunk=32, slots=2, window=256, cache_tokens=512).run(traffic)


@settings(max_examples=30)
@given(st.lists(arrivals, min_size=20, max_size=80))
def test_no_request_waits_for_more_than_a_fair_share_of_the_others_work(
    traffic: list[Arrival],
) -> None:
    equals = [Arrival(**{**vars(a), "priority": 0, "patience": None}) for a in traffic]
    journeys = Simulation(rows=ROWS).run(equals)

    for journey in journeys:
        assert work_before(journey, journeys) <= fair_wait(journey, journeys)


def work_before(journey: Journey, journeys: list[Journey]) -> int:
    """Tokens of requests that started while this one waited."""
    assert journey.started is not None
    return sum(
        each.arrival.prompt + each.arrival.answer
        for each in journeys
        if each.started is not None
        and journey.arrival.at <= each.started <= journey.started
        and each is not journey
    )


def fair_wait(journey: Journey, journeys: list[Journey]) -> int:
    """While a share waits, no other one of its level gets more than two units beyond what it
    gets itself: here, what of its own adapter's came earlier."""
    like = {"tenant": journey.arrival.tenant, "adapter": journey.arrival.adapter}
    own = sum(
        each.arrival.prompt + each.arrival.answer
        for each in journeys
        if each.is_like(**like) and each.arrival.at <= journey.arrival.at
    )
    of_key = len(ADAPTERS) * (own + 2 * UNIT)
    return len(TENANTS) * (of_key + 2 * UNIT)


sizes = st.tuples(st.integers(5, 150), st.integers(5, 100))


@settings(max_examples=12)
@given(sizes, sizes, st.sampled_from(["adapter", "tenant"]))
def test_two_that_always_have_something_waiting_get_equally_much(
    one: tuple[int, int], other: tuple[int, int], level: str
) -> None:
    assert largest_lead(one, other, level) <= 2 * UNIT


@pytest.mark.usefixtures("unfair")
@pytest.mark.parametrize("level", ["adapter", "tenant"])
def test_in_order_of_arrival_they_would_not(level: str) -> None:
    assert largest_lead((150, 100), (5, 5), level) > 2 * UNIT


def largest_lead(one: tuple[int, int], other: tuple[int, int], level: str) -> int:
    """In tokens served, over any time in which both had requests waiting."""
    simulation = Simulation(rows=ROWS)
    for name, (prompt, answer) in (("a", one), ("b", other)):
        for _ in range(8 * UNIT // (prompt + answer)):
            simulation.arrive(Arrival(at=0, prompt=prompt, answer=answer, **{level: name}))
    place = 0 if level == "tenant" else 1
    leads = [0]
    while {"a", "b"} <= {getattr(s, level) for s in simulation.scheduler if s.slot is None}:
        simulation.step()
        served = {flow[place]: tokens for flow, tokens in simulation.served.items()}
        leads.append(served.get("a", 0) - served.get("b", 0))
    return max(leads) - min(leads)


tenants = st.lists(
    st.tuples(sizes, st.floats(0.1, 10), st.booleans()), min_size=2, max_size=5
).filter(lambda each: sum(always for *_, always in each) >= 2)


@settings(max_examples=25)
@given(tenants)
def test_tenants_whose_requests_always_wait_share_by_their_weights_what_others_leave(
    given_tenants: list[tuple[tuple[int, int], float, bool]],
) -> None:
    """Some tenants always have requests waiting, the others now and then. The simulation asserts
    that no row idles while a request waits."""
    simulation = Simulation(rows=ROWS)
    kinds = {
        str(number): {"prompt": prompt, "answer": answer, "weight": weight}
        for number, ((prompt, answer), weight, _) in enumerate(given_tenants)
    }
    always = {str(number) for number, (*_, is_always) in enumerate(given_tenants) if is_always}

    def waiting(tenant: str) -> int:
        return sum(s.slot is None and s.tenant == tenant for s in simulation.scheduler)

    widest = dict.fromkeys(always, (0.0, 0.0))
    while simulation.steps < 1500:
        for tenant, kind in kinds.items():
            most = 3 if tenant in always or simulation.steps % 400 == 0 else 0
            while waiting(tenant) < most:
                simulation.arrive(Arrival(at=simulation.now, tenant=tenant, **kind))  # type: ignore[arg-type]
        simulation.step()
        virtual = {
            tenant: simulation.served.get((tenant, ""), 0) / kinds[tenant]["weight"]
            for tenant in always
        }
        first = virtual[min(always)]
        for tenant, used in virtual.items():
            low, high = widest[tenant]
            widest[tenant] = min(low, used - first), max(high, used - first)

    unit = {tenant: UNIT / kinds[tenant]["weight"] for tenant in always}
    for tenant, (low, high) in widest.items():
        assert high - low <= 2 * (unit[tenant] + unit[min(always)])


def test_the_lightest_tenant_is_not_starved_by_heavy_ones() -> None:
    heavy = [
        Arrival(at=0, prompt=50, answer=20, tenant=f"heavy-{n}", weight=100)
        for n in range(3)
        for _ in range(200)
    ]
    light = Arrival(at=0.1, prompt=50, answer=20, tenant="light", weight=0.01)
    journeys = Simulation(rows=ROWS).run([*heavy, light])

    [journey] = [each for each in journeys if each.is_like(tenant="light")]
    assert journey.started is not None
    before = sum((each.started or 0) < journey.started for each in journeys)
    assert before <= 2 * ROWS, "one that comes anew has used nothing since"


def test_a_tenant_alone_gets_everything_however_light_it_is() -> None:
    alone = [Arrival(at=0, prompt=50, answer=20, tenant="a", weight=w) for w in [0.01] * 20]
    light = Simulation(rows=ROWS)
    light.run(alone)
    usual = Simulation(rows=ROWS)
    usual.run([Arrival(**{**vars(each), "weight": 1.0}) for each in alone])

    assert light.now == usual.now


def test_a_flood_adds_little_to_the_first_token_of_others() -> None:
    quiet, flooded = ttft_without_and_with_a_flood()

    # A row has to become free: at most the time that a request takes in a full batch.
    assert flooded <= quiet + 1.5


@pytest.mark.usefixtures("unfair")
def test_in_order_of_arrival_it_would_add_all_of_its_own_time() -> None:
    quiet, flooded = ttft_without_and_with_a_flood()

    assert flooded > quiet + 15


def ttft_without_and_with_a_flood() -> tuple[float, float]:
    """The worst of a key that asks once a second, in seconds."""
    random = Random(7)
    modest = poisson(random, rate=1.0, until=60, tenant="modest")
    greedy = [
        Arrival(at=10.0, prompt=100, answer=50, adapter=f"a{n % 20}", tenant="greedy")
        for n in range(400)
    ]
    quiet = Simulation(rows=8).run(modest)
    flooded = Simulation(rows=8).run([*modest, *greedy])
    return worst_ttft(quiet), worst_ttft(flooded, tenant="modest")


@pytest.mark.parametrize(
    ("prompt", "rate", "flood"),
    [(64, 4.0, 1008), (100, 2.5, 1008), (200, 1.5, 1008), (64, 4.0, 250), (64, 4.0, 150)],
)
def test_a_flood_of_prompts_leaves_others_their_time_to_the_first_token(
    prompt: int, rate: float, flood: int
) -> None:
    assert slowed_by_prompts(prompt, rate, flood) < 1.5


@pytest.mark.parametrize("flood", [1008, 150])
def test_with_long_steps_it_would_take_several_times_as_long(
    monkeypatch: pytest.MonkeyPatch, flood: int
) -> None:
    monkeypatch.setattr(scheduler, "AMONG_TENANTS", 1)

    assert slowed_by_prompts(64, 4.0, flood) > 3


def slowed_by_prompts(prompt: int, rate: float, flood: int) -> float:
    """How many times as long the 99th of a hundred first tokens takes beside 4,032 tokens of
    prompts, each of `flood`, that come together every 16 seconds: the mean of three times ten
    minutes."""
    return fmean(_slowed_by_prompts(prompt, rate, flood, seed) for seed in range(3))


def _slowed_by_prompts(prompt: int, rate: float, flood: int, seed: int) -> float:
    random = Random(seed)
    times = list(accumulate(random.expovariate(rate) for _ in range(int(600 * rate))))
    modest = [Arrival(at=at, prompt=prompt, answer=8, tenant="modest") for at in times]
    one = Arrival(at=0.0, prompt=flood, answer=1, tenant="greedy")
    starts = range(0, int(times[-1]), 16)
    greedy = [replace(one, at=at) for at in starts for _ in range(4032 // flood)]

    def slow(traffic: list[Arrival]) -> float:
        machine = Simulation(
            rows=32, chunk=512, window=1024, step_seconds=0.02, token_seconds=0.0013
        )
        journeys = machine.run(traffic)
        return quantiles([j.ttft for j in journeys if j.is_like(tenant="modest")], n=100)[-1]

    return slow([*modest, *greedy]) / slow(modest)


def test_who_asks_now_and_then_never_waits_for_a_long_step_of_another_tenant() -> None:
    long = Arrival(at=0.0, prompt=20_000, answer=1, tenant="greedy")
    modest = [Arrival(at=3.0 * n, prompt=5, answer=1, tenant="modest") for n in range(9)]
    machine = Simulation(rows=4, chunk=512, window=32_768, step_seconds=0.02, token_seconds=0.0013)
    journeys = machine.run([long, *modest])

    assert machine.now > modest[-1].at
    assert worst_ttft(journeys, tenant="modest") < 0.25


def test_short_prompts_do_not_wait_for_one_as_long_as_the_window() -> None:
    long = Arrival(at=0.0, prompt=8000, answer=10, adapter="long")
    short = [Arrival(at=0.1, prompt=32, answer=10) for _ in range(31)]
    journeys = Simulation(rows=32, window=8192).run([long, *short])
    alone = Simulation(rows=32, window=8192).run(short)

    assert worst_ttft(journeys, adapter="") <= 2 * worst_ttft(alone) + 0.2
    without = Simulation(rows=32, window=8192).run([long])
    assert worst_ttft(journeys, adapter="long") <= 1.5 * worst_ttft(without)


@pytest.mark.parametrize("hours", [2, pytest.param(24, marks=pytest.mark.full)])
def test_hours_of_a_busy_day(hours: int) -> None:
    """Three hundred adapters by Zipf on 16 slots, keys of unequal appetite, bursts, clients that
    leave, and a cache that is too small; overloaded every now and then."""
    random = Random(11)
    traffic = [
        arrival
        for number, rate in enumerate((0.01, 0.02, 0.04, 0.08))
        for arrival in poisson(random, rate, until=3600 * hours, tenant=f"key-{number}")
    ]
    for burst in range(6 * hours):
        traffic += [
            Arrival(at=600 * burst + 300, prompt=80, answer=40, adapter=zipf(random), tenant="bulk")
            for _ in range(250)
        ]
    day = Simulation(rows=16, slots=16, cache_tokens=2048, step_seconds=0.25, token_seconds=0.002)
    journeys = day.run(traffic)

    assert day.now > 3600 * hours
    assert day.scheduler.preemptions > 0
    assert day.residency.stats().swaps > 16
    assert worst_ttft(journeys, tenant="key-0") < 60
    assert worst_ttft(journeys, tenant="bulk") > 60


def poisson(random: Random, rate: float, until: float, tenant: str) -> list[Arrival]:
    """`rate` requests a second; one in ten is not waited for."""
    arrivals = []
    now = random.expovariate(rate)
    while now < until:
        arrivals.append(
            Arrival(
                at=now,
                prompt=random.randint(5, 150),
                answer=random.randint(5, 150),
                adapter=zipf(random),
                tenant=tenant,
                priority=random.choice((0, 0, 0, 1)),
                patience=random.uniform(0, 10) if random.random() < 0.1 else None,
            )
        )
        now += random.expovariate(rate)
    return arrivals


def zipf(random: Random, adapters: int = 300) -> str:
    weights = [1 / rank for rank in range(1, adapters + 1)]
    return f"adapter-{random.choices(range(adapters), weights)[0]}"
