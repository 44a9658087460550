"""The token bucket of a tenant's requests and tokens."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infuse.server.engine.token_bucket import Bucket

PAUSES = st.floats(0, 100)
AMOUNTS = st.integers(1, 50)
LIMITS = st.integers(1, 40)
HOLDS = st.one_of(st.none(), st.integers(1, 80))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@given(LIMITS, HOLDS, st.lists(st.tuples(PAUSES, AMOUNTS), max_size=60))
def test_no_time_lets_more_in_than_it_fills_and_one_overdraft(
    limit: int, holds: int | None, asked: list[tuple[float, int]]
) -> None:
    clock = Clock()
    bucket = Bucket(clock)
    admitted: list[tuple[float, int]] = []
    for pause, amount in asked:
        clock.now += pause
        if bucket.seconds_until(amount, limit, holds) == 0:
            bucket.spend(amount, limit)
            admitted.append((clock.now, amount))

    most = holds or limit
    for first in range(len(admitted)):
        for last in range(first, len(admitted)):
            seconds = admitted[last][0] - admitted[first][0]
            spent = sum(amount for _, amount in admitted[first:last])
            room = most + limit * seconds / 60 - min(admitted[last][1], most)
            overdraft = max(0, *(amount - most for _, amount in admitted[first : last + 1]))
            assert spent <= room + overdraft + 1e-3


@given(LIMITS, HOLDS, st.lists(st.tuples(PAUSES, AMOUNTS), max_size=20), AMOUNTS)
def test_who_comes_back_when_told_is_let_in_and_not_a_second_earlier(
    limit: int, holds: int | None, spent: list[tuple[float, int]], amount: int
) -> None:
    clock = Clock()
    bucket = Bucket(clock)
    for pause, each in spent:
        clock.now += pause
        bucket.spend(each, limit)

    seconds = math.ceil(bucket.seconds_until(amount, limit, holds))
    if seconds:
        clock.now += seconds - 1
        assert bucket.seconds_until(amount, limit, holds) > 0
        clock.now += 1
    assert bucket.seconds_until(amount, limit, holds) == 0


@given(st.lists(st.tuples(PAUSES, AMOUNTS)))
def test_without_a_limit_everything_fits(spent: list[tuple[float, int]]) -> None:
    clock = Clock()
    bucket = Bucket(clock)
    for pause, amount in spent:
        clock.now += pause
        assert bucket.seconds_until(amount, None) == 0
        bucket.spend(amount, None)


def test_a_limit_that_changes_counts_from_then_on() -> None:
    clock = Clock()
    bucket = Bucket(clock)
    bucket.spend(10, 10)

    assert bucket.seconds_until(1, 10) == pytest.approx(6)
    assert bucket.seconds_until(1, 20) == 0
    assert bucket.seconds_until(1, 5) == pytest.approx(72)
