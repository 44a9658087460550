"""Whether a request is admitted: the queue is bounded, and a flood refuses only itself."""

import heapq
import itertools
import math
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infuse.adapters.residency import Lease
from infuse.server.engine import WaitTooLong
from infuse.server.engine.admission import Admission
from infuse.server.engine.request import GenerationRequest, SamplingParams

CAPACITY = 8


def request(
    tenant: str = "", adapter: str = "", patience: float = math.inf, weight: float = 1.0
) -> GenerationRequest:
    lease = cast(Lease, SimpleNamespace(label=adapter)) if adapter else None
    params = SamplingParams(max_tokens=1)
    return GenerationRequest(
        id="",
        prompt=(1,),
        params=params,
        lease=lease,
        tenant=tenant,
        patience=patience,
        weight=weight,
    )


def flooded(**like: Any) -> Admission:
    admission = Admission(rows=2, queue=CAPACITY - 2)
    assert admission.admit([request(**like)] * CAPACITY)
    assert not admission.admit([request(**like)])
    return admission


def taken(admission: Admission, **like: Any) -> int:
    count = 0
    while admission.admit([request(**like)]):
        count += 1
    return count


def test_another_tenant_has_places_in_a_full_queue_up_to_an_even_part() -> None:
    admission = flooded(tenant="flood")

    assert taken(admission, tenant="b") == CAPACITY // 2
    assert taken(admission, tenant="c") == CAPACITY // 3


def test_places_of_a_full_queue_go_by_weight() -> None:
    assert taken(flooded(tenant="flood"), tenant="b", weight=3) == 3 * CAPACITY // 4
    assert taken(flooded(tenant="flood", weight=3), tenant="b") == CAPACITY // 4


def test_another_adapter_has_places_in_a_full_queue() -> None:
    admission = flooded(adapter="flood")

    assert taken(admission, adapter="b") == CAPACITY // 2
    assert taken(admission) == 0, "half as many again were taken"


def test_a_free_place_is_anybodys() -> None:
    admission = flooded(tenant="flood")
    admission.leave(request(tenant="flood"))

    assert admission.admit([request(tenant="flood")])
    assert not admission.admit([request(tenant="flood")])


def test_an_order_that_does_not_fit_takes_no_place() -> None:
    admission = Admission(rows=2, queue=CAPACITY - 2)

    assert not admission.admit([request()] * (CAPACITY + 1))
    assert admission.admit([request()] * CAPACITY)


@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from("abc"), st.sampled_from(["", "x", "y"])),
        max_size=80,
    )
)
def test_places_are_bounded_and_an_empty_queue_lets_in(
    events: list[tuple[bool, str, str]],
) -> None:
    admission = Admission(rows=2, queue=CAPACITY - 2)
    inside: list[GenerationRequest] = []
    for enters, tenant, adapter in events:
        if enters and admission.admit([request(tenant, adapter)]):
            inside.append(request(tenant, adapter))
        elif not enters and inside:
            admission.leave(inside.pop(0))
        assert len(inside) <= 2 * CAPACITY
    for each in inside:
        admission.leave(each)

    assert admission.admit([request()] * CAPACITY)


# When to come back


class Line:
    """Requests on a virtual clock: so many are served at once, each for a random time."""

    ROWS = 8

    def __init__(self, seed: int, seconds: float, **limits: Any) -> None:
        """`seconds`: that a request is served for, on average."""
        self.now = 0.0
        self.admission = Admission(
            rows=self.ROWS, now=lambda: self.now, **{"queue": 2 * self.ROWS} | limits
        )
        self.rate = self.ROWS / seconds
        """How many can be served in a second."""
        self.outside: deque[float] = deque()
        """When each came that takes a place as soon as there is one."""
        self.waits: list[float] = []
        """Of those that were outside."""
        self.returns: Counter[bool] = Counter()
        """How many that came back when they were told were admitted, and how many not."""
        self._random = Random(seed)
        self._seconds = seconds
        self.foretold: list[tuple[float, float]] = []
        """Of those that waited for a row: what was estimated, and what it became."""
        self._waiting: deque[tuple[GenerationRequest, float, float]] = deque()
        """Each with when it came, and the estimate then."""
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers = itertools.count()

    def at(self, when: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), event))

    def arrive(self, rate: float, until: float, many: int = 1) -> None:
        """`rate` times a second, `many` come at once."""
        when = 0.0
        while (when := when + self._random.expovariate(rate)) < until:
            for _ in range(many):
                self.at(when, self.ask)

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until

    def take(self) -> int | None:
        """None: a request is admitted; else after how many seconds it is to come back."""
        asked, estimate = request(), self.admission.wait_seconds
        if not self.admission.admit([asked]):
            return self.admission.refusal([asked]).retry_after
        self._waiting.append((asked, self.now, estimate))
        if self.admission.admitted <= self.ROWS:
            self._serve()
        return None

    def ask(self, returns: bool = False) -> None:
        told = self.take()
        if returns:
            self.returns[told is None] += 1
        if told is not None:
            self.at(self.now + told, lambda: self.ask(returns=True))

    def _serve(self) -> None:
        served, came, estimate = self._waiting.popleft()
        if self.now > came:
            self.foretold.append((estimate, self.now - came))
        seconds = self._random.uniform(0.2, 1.8) * self._seconds
        self.at(self.now + seconds, lambda: self._end(served))

    def _end(self, served: GenerationRequest) -> None:
        self.admission.leave(served)
        if self._waiting:
            self._serve()
        if self.outside and self.take() is None:
            self.waits.append(self.now - self.outside.popleft())


@pytest.mark.parametrize("seconds", [0.5, 4.0, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_a_refused_request_is_told_when_a_place_becomes_free(seed: int, seconds: float) -> None:
    line = Line(seed, seconds)
    line.arrive(line.rate, until=20 * seconds)
    line.run(20 * seconds)
    told = [when for _ in range(60) if (when := line.take()) is not None]
    line.outside.extend([line.now] * len(told))
    line.run(line.now + 100 * seconds)

    assert len(line.waits) == len(told) >= 30
    known = [(each, wait) for each, wait in zip(told, line.waits, strict=True) if wait < 60]
    right = [each <= max(1, 2 * wait) + 1 and wait <= 2 * each for each, wait in known]
    assert sum(right) >= 0.75 * len(known)


@pytest.mark.parametrize("seconds", [0.5, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_most_that_come_back_when_they_were_told_are_let_in(seed: int, seconds: float) -> None:
    """A load that is served in the long run, half of which comes in bursts that are not."""
    line = Line(seed, seconds)
    line.arrive(0.4 * line.rate, until=400 * seconds)
    line.arrive(0.4 * line.rate / 40, until=400 * seconds, many=40)
    line.run(500 * seconds)

    assert line.returns.total() >= 50
    assert line.returns[True] > line.returns[False]


# How long it would wait


@pytest.mark.parametrize("seconds", [0.5, 20.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_estimated_wait_is_near_the_true_one(seed: int, seconds: float) -> None:
    line = Line(seed, seconds, queue=20 * Line.ROWS)
    line.arrive(0.2 * line.rate, until=20 * seconds)
    line.arrive(0.4 * line.rate / 40, until=200 * seconds, many=60)
    line.run(400 * seconds)

    known = [(told, wait) for told, wait in line.foretold if told]
    waits = [(told, wait) for told, wait in known if wait > seconds]
    assert len(waits) > 100
    assert sum(wait / 2 <= told <= 2 * wait for told, wait in waits) >= 0.9 * len(waits)


def test_requests_that_run_alone_foretell_what_a_full_batch_does() -> None:
    line = Line(0, 1.0, queue=100)
    for number in range(20):
        line.at(2.0 * number, line.ask)
    line.run(100.0)
    for _ in range(Line.ROWS + 16):
        line.ask()

    assert 1.0 < line.admission.wait_seconds < 4.0, "17 end before it, 8 of them in a second"


def busy(**limits: Any) -> Line:
    """All rows are in use, and each of the eight ends within a second."""
    line = Line(0, 1.0, **limits)
    line.arrive(line.rate, until=30.0)
    line.run(30.0)
    while line.admission.admitted < Line.ROWS:
        line.take()
    return line


def test_a_request_that_would_wait_longer_than_it_can_is_refused() -> None:
    line = busy(queue=100)
    for _ in range(80):
        line.take()
    late, patient = request(patience=2.0), request(patience=60.0)

    assert not line.admission.admit([late])
    refusal = line.admission.refusal([late])
    assert isinstance(refusal, WaitTooLong)
    assert 6 <= refusal.retry_after <= 12, "81 end within about ten seconds"
    assert line.admission.admit([patient])


def test_no_request_waits_longer_than_the_longest_wait_by_the_estimate() -> None:
    line = busy(queue=1000, longest_wait=5.0)
    admitted = 0
    while line.take() is None:
        admitted += 1

    assert 20 <= admitted <= 80, "as many as end within five seconds"
    assert isinstance(line.admission.refusal([request()]), WaitTooLong)


def test_a_tenants_flood_lengthens_the_wait_of_others_by_little() -> None:
    line = busy(queue=1000, longest_wait=5.0)
    while line.take() is None:
        pass

    assert line.admission.admit([request("other", patience=1.0)])


def test_who_has_more_weight_waits_for_less() -> None:
    def wait(weight: float) -> int:
        """The shortest patience with which one of two that flood is admitted."""
        admission = busy(queue=1000).admission
        for number in range(200):
            assert admission.admit([request(tenant="ab"[number % 2])])
        asked = (request("a", patience=each, weight=weight) for each in range(1, 60))
        return next(int(each.patience) for each in asked if admission.admit([each]))

    assert wait(9) < 0.7 * wait(1)


def test_a_request_waits_for_no_estimate_where_a_row_is_free() -> None:
    line = busy(queue=100)
    line.run(line.now + 100.0)

    assert line.admission.admit([request(patience=1e-9)])


def test_before_as_many_have_ended_as_there_are_rows_none_is_refused_for_its_wait() -> None:
    line = Line(0, 1.0, queue=100)
    for _ in range(50):
        line.take()
    line.run(0.5)

    assert line.admission.admit([request(patience=1e-9)])


# Overload


def test_overload_begins_before_requests_are_refused_and_ends_well_below() -> None:
    admission = Admission(rows=2, queue=98)
    inside = [request() for _ in range(100)]
    changes = []
    for each in inside:
        assert admission.admit([each])
        changes.append(admission.is_overloaded)
    begins = changes.index(True)
    changes.clear()
    for each in inside:
        admission.leave(each)
        changes.append(admission.is_overloaded)
    ends = 100 - changes.index(False)

    assert 80 < begins < 100
    assert 50 < ends < begins - 10


def test_overload_is_also_a_long_wait_in_a_queue_that_has_places() -> None:
    line = busy(queue=1000, longest_wait=5.0)
    assert not line.admission.is_overloaded
    while line.take() is None:
        pass

    assert line.admission.is_overloaded


def test_the_flood_of_one_of_several_tenants_is_no_overload() -> None:
    admission = flooded(tenant="flood", adapter="a")
    assert not admission.is_overloaded
    assert taken(admission, tenant="flood", adapter="b")
    assert not admission.is_overloaded
    for number in range(20):
        taken(admission, tenant=str(number))

    assert admission.is_overloaded


def test_before_the_first_end_a_refused_request_waits_as_long_as_it_has_not_come() -> None:
    line = Line(0, 100.0)
    assert [line.take() for _ in range(3 * Line.ROWS)] == [None] * 3 * Line.ROWS
    assert line.take() == 1
    line.now = 7.0
    assert line.take() == 7
    line.now = 700.0
    assert line.take() == 60


def test_hours_without_requests_do_not_count() -> None:
    line = Line(0, 1.0)
    line.arrive(line.rate, until=20.0)
    line.run(3600.0)
    while line.take() is None:
        pass

    assert line.take() == 1


def test_tenants_that_are_refused_share_what_becomes_free() -> None:
    line = Line(0, 8.0)
    line.arrive(line.rate, until=100.0)
    line.run(100.0)
    while line.take() is None:
        pass
    admission = line.admission
    flood = [admission.seconds_until_free([request()]) for _ in range(20)]
    other = admission.seconds_until_free([request("other")])

    assert flood == sorted(flood)
    assert other <= flood[4], "a flood of one does not keep another away"
