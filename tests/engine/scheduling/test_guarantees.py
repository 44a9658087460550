"""Tokens that tenants are guaranteed: ahead of all others, and the rest by weight, on a virtual
clock."""

from dataclasses import dataclass, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from infuse.server.engine.admission import Admission
from infuse.server.engine.fair_queue import HEADROOM
from infuse.server.engine.request import GenerationRequest, SamplingParams
from tests.engine.simulation import Arrival, Simulation

ROWS, LONGEST = 4, 50
UNIT = ROWS * LONGEST
"""Tokens that all rows together may have in hand."""
STEPS, WARM = 2000, 700
"""By `WARM`, the minute's worth that each has at the start is used up."""
STEP_SECONDS = 0.1
"""So four rows that decode have some 2,300 tokens a minute, which is the least of any mix."""


@dataclass(frozen=True)
class Tenant:
    """One that always has requests waiting, or one that has some now and then."""

    prompt: int
    answer: int
    weight: float
    guaranteed: int = 0
    always: bool = True

    def arrival(self, name: str, at: float) -> Arrival:
        return Arrival(
            at=at,
            tenant=name,
            prompt=self.prompt,
            answer=self.answer,
            weight=self.weight,
            guaranteed=self.guaranteed,
        )


def kinds(**fields: st.SearchStrategy[object]) -> st.SearchStrategy[Tenant]:
    sizes = {"prompt": st.integers(5, 30), "answer": st.integers(5, 20)}
    return st.builds(Tenant, **sizes, weight=st.floats(0.1, 10), **fields)


guaranteed_ones = st.lists(kinds(guaranteed=st.integers(200, 600)), min_size=1, max_size=3)
others = st.lists(kinds(), min_size=2, max_size=3)
visitors = st.lists(kinds(always=st.just(False)), max_size=1)


def served(tenants: list[Tenant], steps: int = STEPS) -> list[tuple[float, list[int]]]:
    """After each step: the time, and the tokens that each tenant has had."""
    simulation = Simulation(rows=ROWS, step_seconds=STEP_SECONDS)

    def waiting(name: str) -> int:
        return sum(s.slot is None and s.tenant == name for s in simulation.scheduler)

    found = []
    while simulation.steps < steps:
        for number, tenant in enumerate(tenants):
            most = 3 if tenant.always or simulation.steps % 400 == 0 else 0
            while waiting(str(number)) < most:
                simulation.arrive(tenant.arrival(str(number), simulation.now))
        simulation.step()
        tokens = [simulation.served.get((str(n), ""), 0) for n in range(len(tenants))]
        found.append((simulation.now, tokens))
    return found


def largest_fall(values: list[float]) -> float:
    """The most by which a later value is less than an earlier one."""
    highest, fall = values[0], 0.0
    for each in values:
        highest = max(highest, each)
        fall = max(fall, highest - each)
    return fall


def arrears(tenant: Tenant, number: int, times: list[tuple[float, list[int]]]) -> float:
    """By how many tokens a tenant was behind what it is guaranteed, over any time."""
    return largest_fall([had[number] - tenant.guaranteed * at / 60 for at, had in times])


def beyond(tenant: Tenant, number: int, times: list[tuple[float, list[int]]]) -> list[float]:
    """The tokens that a tenant has had beyond what it is guaranteed, for its weight."""
    return [(had[number] - tenant.guaranteed * at / 60) / tenant.weight for at, had in times]


def in_hand(tenant: Tenant) -> float:
    """The tokens by which what is charged and what is served differ: those of all rows, and those
    of the seconds until a row is free."""
    return 2 * UNIT + tenant.guaranteed * LONGEST * STEP_SECONDS / 60


@settings(max_examples=4)
@given(guaranteed_ones, others, visitors)
def test_who_always_waits_gets_what_it_is_guaranteed_and_its_share_of_what_that_leaves(
    guaranteed: list[Tenant], rest: list[Tenant], now_and_then: list[Tenant]
) -> None:
    """Over any time, whatever others ask for."""
    always = [*guaranteed, *rest]
    times = served([*always, *now_and_then])

    for number, tenant in enumerate(guaranteed):
        assert arrears(tenant, number, times) <= in_hand(tenant)
    for number, tenant in enumerate(always):
        leads = [
            each - of_first
            for each, of_first in zip(
                beyond(tenant, number, times[WARM:]),
                beyond(always[0], 0, times[WARM:]),
                strict=True,
            )
        ]
        slack = in_hand(tenant) / tenant.weight + in_hand(always[0]) / always[0].weight
        assert max(leads) - min(leads) <= 2 * slack


def test_by_its_weight_alone_it_would_not() -> None:
    light = Tenant(prompt=20, answer=10, weight=0.1, guaranteed=600)
    heavy = Tenant(prompt=20, answer=10, weight=10)
    times = served([replace(light, guaranteed=0), heavy, heavy])

    assert arrears(light, 0, times) > 2 * in_hand(light)


def test_what_a_tenant_has_had_by_its_guarantee_is_no_debt_later() -> None:
    """Nor do those wait who come anew: they begin where the others are."""
    guaranteed = Tenant(prompt=20, answer=10, weight=1, guaranteed=1800)
    plain = Tenant(prompt=20, answer=10, weight=1)
    simulation = Simulation(rows=ROWS, step_seconds=STEP_SECONDS)
    for name, tenant, many in (("guaranteed", guaranteed, 300), ("plain", plain, 150)):
        for _ in range(many):
            simulation.arrive(tenant.arrival(name, 0))
    while simulation.now < 60:
        simulation.step()
    late = [simulation.arrive(plain.arrival("late", simulation.now)) for _ in range(4)]
    begun = len([each for each in simulation.journeys if each.started is not None])
    while any(each.started is None for each in late):
        simulation.step()

    started = len([each for each in simulation.journeys if each.started is not None])
    assert started - begun <= 8 * ROWS


def test_an_idle_tenant_has_a_minutes_worth_ahead_of_others_and_no_more() -> None:
    simulation = Simulation(rows=1, step_seconds=STEP_SECONDS)
    flood = Tenant(prompt=20, answer=10, weight=1)
    for _ in range(40):
        simulation.arrive(flood.arrival("flood", 0))
    while simulation.now < 10:
        simulation.step()
    guaranteed = replace(flood, weight=0.01, guaranteed=80)
    for _ in range(10):
        simulation.arrive(guaranteed.arrival("guaranteed", simulation.now))
    late = simulation.now
    while simulation.now < late + 10:
        simulation.step()

    begun = [each for each in simulation.journeys if each.started and each.started > late]
    begun.sort(key=lambda each: each.started or 0)
    names = [each.arrival.tenant for each in begun]
    assert names[:6] == ["guaranteed"] * 4 + ["flood"] * 2, "three ahead, and one by its share"


def test_those_who_are_guaranteed_more_than_there_is_take_turns() -> None:
    tenants = [Tenant(prompt=20, answer=10, weight=w, guaranteed=50_000) for w in (0.1, 1, 10)]
    shares = [had / sum(tokens) for _, tokens in served(tenants, 1500)[-1:] for had in tokens]

    assert all(0.3 < share < 0.37 for share in shares)


# Admission


def test_a_request_that_its_guarantee_lets_start_in_time_is_not_refused_for_its_wait() -> None:
    """Two hundred of others wait, which take some seven minutes by equal shares."""
    clock = [0.0]
    admission = Admission(rows=1, queue=1000, now=lambda: clock[0])

    def request(tenant: str, guaranteed: int = 0, patience: float = 1000) -> GenerationRequest:
        return GenerationRequest(
            id="",
            prompt=(1,) * (100 - HEADROOM),
            params=SamplingParams(max_tokens=HEADROOM),
            tenant=tenant,
            guaranteed=guaranteed,
            patience=patience,
        )

    for _ in range(20):
        assert admission.admit([request("flood")])
    for _ in range(20):
        clock[0] += 1.0
        admission.leave(request("flood"))
    for _ in range(200):
        assert admission.admit([request("flood")])
    for _ in range(10):
        assert admission.admit([request("a")])

    assert not admission.admit([request("a", patience=15)]), "22 end before it, one a second"
    assert not admission.admit([request("a", guaranteed=3000, patience=15)]), "it has 20 s ahead"
    assert admission.admit([request("a", guaranteed=6000, patience=15)])
