"""Which adapters requests choose, and when they come."""

from collections import Counter
from itertools import pairwise
from statistics import fmean

import pytest

from benchmarks.arrivals import poisson
from benchmarks.workload import choose

NAMES = [f"adapter-{number}" for number in range(1000)]


def test_identical_requests_use_one_adapter() -> None:
    assert set(choose("identical", NAMES, 32)) == {NAMES[0]}


def test_distinct_requests_use_one_each() -> None:
    assert choose("distinct", NAMES, 32) == NAMES[:32]


def test_uniform_requests_use_the_root_of_their_number_evenly() -> None:
    found = Counter(choose("uniform", NAMES, 36))
    assert len(found) == 6
    assert set(found.values()) == {6}


@pytest.mark.parametrize("exponent", [1.0, 1.5])
def test_zipf_makes_the_second_as_popular_as_its_rank_says(exponent: float) -> None:
    found = Counter(choose("zipf", NAMES, 200_000, exponent=exponent))
    assert found[NAMES[0]] / found[NAMES[1]] == pytest.approx(2**exponent, rel=0.05)
    assert found[NAMES[0]] / found[NAMES[9]] == pytest.approx(10**exponent, rel=0.15)


def test_a_seed_fixes_the_choice() -> None:
    assert choose("zipf", NAMES, 50, seed=3) == choose("zipf", NAMES, 50, seed=3)
    assert choose("zipf", NAMES, 50, seed=3) != choose("zipf", NAMES, 50, seed=4)


def test_poisson_arrivals_come_at_the_rate_and_in_order() -> None:
    times = poisson(rate=4.0, count=20_000, seed=0)
    assert times == sorted(times)
    assert times[-1] / len(times) == pytest.approx(1 / 4.0, rel=0.03)


def test_poisson_gaps_are_exponential() -> None:
    """As wide as long, and without memory: a long gap says nothing of the next."""
    times = [0.0, *poisson(rate=1.0, count=50_000, seed=1)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert fmean((gap - 1) ** 2 for gap in gaps) == pytest.approx(1.0, rel=0.05)
    after_long = [later for gap, later in pairwise(gaps) if gap > 1]
    assert fmean(after_long) == pytest.approx(1.0, rel=0.05)


def test_a_seed_fixes_the_arrivals() -> None:
    assert poisson(2.0, 10, seed=5) == poisson(2.0, 10, seed=5)
    assert poisson(2.0, 10, seed=5) != poisson(2.0, 10, seed=6)
