"""What the figures' bounds and percentiles mean."""

import random
from statistics import median

import pytest

from benchmarks.statistics import bounds_of_median, percentile, percentiles, summary


def test_the_bounds_of_twenty_values_are_the_sixth_from_either_end() -> None:
    """P(at most 5 heads of 20) = 0.021, of 6 = 0.058."""
    bounds = bounds_of_median(range(20))
    assert bounds is not None
    assert (bounds.lower, bounds.upper) == (5, 14)


@pytest.mark.parametrize(("count", "lower"), [(5, 0), (7, 0), (8, 1), (10, 1), (11, 2)])
def test_few_values_give_loose_bounds(count: int, lower: int) -> None:
    bounds = bounds_of_median(range(count))
    assert bounds is not None
    assert bounds.lower == lower
    assert bounds.upper == count - 1 - lower


def test_below_five_values_nothing_can_be_said() -> None:
    assert bounds_of_median([1.0, 2.0, 3.0, 4.0]) is None


def test_the_lower_bound_is_too_high_in_at_most_five_of_a_hundred_samples() -> None:
    rng = random.Random(0)
    samples = [[rng.lognormvariate(0, 1) for _ in range(21)] for _ in range(2000)]
    too_high = sum((found := bounds_of_median(each)) is None or found.lower > 1 for each in samples)
    assert too_high / len(samples) < 0.055


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(number) for number in range(1, 101)]
    random.Random(1).shuffle(values)
    assert percentiles(values) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentile([3.0], 99) == 3.0


def test_a_summary_has_the_middle_and_the_spread() -> None:
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    found = summary(values)
    assert (found["least"], found["median"], found["greatest"]) == (1.0, median(values), 5.0)
    assert found["lower_quartile"] < found["median"] < found["upper_quartile"]
