"""Medians and what can be said about them on a noisy machine."""

import math
from collections.abc import Sequence
from statistics import median, quantiles


def lower_bound_of_median(values: Sequence[float], confidence: float = 0.95) -> float:
    """The true median is above this with at least `confidence`, whatever the distribution.

    An order statistic by the sign test (Conover, Practical Nonparametric Statistics, §3.2).
    """
    ordered = sorted(values)
    n = len(ordered)
    below = 0.0
    rank = 0
    while rank < n:
        below += math.comb(n, rank) / 2**n
        if below > 1 - confidence:
            break
        rank += 1
    assert rank > 0, f"{n} values are too few for a bound"
    return ordered[rank - 1]


def summary(values: Sequence[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {
        "median": median(values),
        "lower_quartile": low,
        "upper_quartile": high,
        "least": min(values),
        "greatest": max(values),
    }
