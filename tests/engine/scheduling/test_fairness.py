"""Who waits for whom: no flood, of an adapter or of a key, keeps another waiting for long."""

from itertools import pairwise
from typing import Any

from tests.engine.simulation import Arrival, Journey, Simulation

ROWS = 4


def flood(count: int, **like: Any) -> list[Arrival]:
    return [Arrival(**{"at": 0.0, "prompt": 20, "answer": 10} | like) for _ in range(count)]


def turns(journeys: list[Journey], **like: object) -> list[int]:
    """Which of all that ever started these were."""
    found = [journey.sequence.turn for journey in journeys if journey.is_like(**like)]
    started = [turn for turn in found if turn is not None]
    assert len(started) == len(found)
    return started


def test_an_adapters_flood_delays_another_adapter_by_one_turn() -> None:
    late = Arrival(at=0.1, prompt=20, answer=10, adapter="b")
    journeys = Simulation(rows=ROWS).run([*flood(30, adapter="a"), late])

    assert turns(journeys, adapter="b") == [ROWS]


def test_a_keys_flood_over_many_adapters_delays_other_keys_by_one_turn_each() -> None:
    greedy = [each for n in range(8) for each in flood(5, adapter=f"a{n}", tenant="greedy")]
    modest = [*flood(1, at=0.1, adapter="a0", tenant="b"), *flood(1, at=0.1, tenant="c")]
    journeys = Simulation(rows=ROWS).run([*greedy, *modest])

    assert turns(journeys, tenant="b") + turns(journeys, tenant="c") == [ROWS, ROWS + 1]


def test_those_who_all_flood_take_turns() -> None:
    journeys = Simulation(rows=1).run([*flood(10, adapter="a"), *flood(10, adapter="b")])

    assert turns(journeys, adapter="a") == list(range(0, 20, 2))
    assert turns(journeys, adapter="b") == list(range(1, 20, 2))


def test_turns_are_counted_in_tokens() -> None:
    long = flood(10, adapter="a", prompt=190, answer=10)
    short = flood(60, adapter="b", prompt=40, answer=10)
    journeys = Simulation(rows=1).run([*long, *short])

    between = [
        sum(a < turn < b for turn in turns(journeys, adapter="b"))
        for a, b in pairwise(turns(journeys, adapter="a"))
    ]
    assert between == [4] * 9


def test_who_asked_for_nothing_has_saved_up_nothing() -> None:
    idle = Arrival(at=0.0, prompt=20, answer=10, adapter="b")
    busy = flood(30, adapter="a")
    back = flood(10, at=1.5, adapter="b")
    journeys = Simulation(rows=1).run([idle, *busy, *back])

    _, *later = turns(journeys, adapter="b")
    assert later == list(range(later[0], later[0] + 20, 2))


def test_a_keys_requests_start_by_priority() -> None:
    arrivals = [a for p in (3, 1, 2) for a in flood(1, adapter=str(p), priority=p)]
    journeys = Simulation(rows=1).run(arrivals)

    assert turns(journeys) == [2, 0, 1]


def test_no_priority_overtakes_another_key() -> None:
    urgent = flood(10, tenant="a", priority=-100)
    journeys = Simulation(rows=1).run([*urgent, *flood(1, tenant="b", priority=100)])

    assert turns(journeys, tenant="b") == [1]


def test_a_patient_request_has_a_turn_while_urgent_ones_keep_coming() -> None:
    urgent = [a for n in range(60) for a in flood(1, at=n * 0.1, priority=-1)]
    journeys = Simulation(rows=1).run([*urgent, *flood(2, at=0.05, priority=5)])

    first, second = turns(journeys, priority=5)
    assert first <= 9
    assert second <= first + 9


def test_an_adapter_without_a_slot_does_not_hold_up_those_that_have_one() -> None:
    running = [*flood(1, adapter="a", answer=200), *flood(1, adapter="b", answer=200)]
    cold = flood(1, at=0.1, adapter="c")
    behind = [*flood(1, at=0.2, adapter="a"), *flood(1, at=0.2)]
    journeys = Simulation(rows=ROWS, slots=2).run([*running, *cold, *behind])

    assert turns(journeys) == [0, 1, 4, 3, 2]


def test_an_adapter_without_a_slot_waits_for_few_of_those_that_have_one() -> None:
    """Two adapters have enough to do for good, and some row of each always runs."""
    hot = [a for n in range(400) for a in flood(1, at=n * 0.02, adapter="ab"[n % 2], answer=30)]
    base = [a for n in range(50) for a in flood(1, at=n * 0.2)]
    cold = flood(1, at=1.0, adapter="c")
    journeys = Simulation(rows=8, slots=2).run([*hot, *base, *cold])

    [waiting] = [j for j in journeys if j.arrival.adapter == "c"]
    assert waiting.started is not None
    overtook = [j for j in journeys if j.started is not None and 1.0 < j.started < waiting.started]
    assert 8 <= sum(j.arrival.adapter != "" for j in overtook) <= 10


def test_who_gave_way_to_urgent_ones_once_does_not_give_way_to_others() -> None:
    patient = Arrival(at=0.0, prompt=60, answer=180, priority=5)
    urgent = [a for n in range(100) for a in flood(1, at=n * 0.5, prompt=60, answer=100)]
    simulation = Simulation(rows=ROWS, window=256, cache_tokens=512)
    first, *others = simulation.run([patient, *urgent])

    assert first.sequence.preempted
    assert first.ended is not None
    assert first.ended < (others[20].ended or 0)
