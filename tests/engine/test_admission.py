"""Whether a request is admitted: the queue is bounded, and a flood refuses only itself."""

import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.residency import Lease
from server.engine import QueueFull
from server.engine.admission import Admission
from server.engine.request import GenerationRequest, SamplingParams

CAPACITY = 8


def request(tenant: str = "", adapter: str = "") -> GenerationRequest:
    lease = cast(Lease, SimpleNamespace(label=adapter)) if adapter else None
    params = SamplingParams(max_tokens=1)
    return GenerationRequest(id="", prompt=(1,), params=params, lease=lease, tenant=tenant)


def flooded(**like: Any) -> Admission:
    admission = Admission(CAPACITY)
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
    admission = Admission(CAPACITY)

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
    admission = Admission(CAPACITY)
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

    def __init__(self, seed: int, seconds: float) -> None:
        """`seconds`: that a request is served for, on average."""
        self.now = 0.0
        self.admission = Admission(3 * self.ROWS, lambda: self.now)
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
        self._waiting: deque[GenerationRequest] = deque()
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
        asked = request()
        if not self.admission.admit([asked]):
            return QueueFull(0, self.admission.seconds_until_free([asked])).retry_after
        self._waiting.append(asked)
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
        served = self._waiting.popleft()
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
