"""Medians and percentiles, and what can be said about them on a noisy machine."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles


@dataclass(frozen=True, slots=True)
class Bounds:
    lower: float
    upper: float


def bounds_of_median(values: Sequence[float], confidence: float = 0.95) -> Bounds | None:
    """The true median is above `lower` with at least `confidence`, whatever the distribution, and
    below `upper` with as much. None where the values are too few to say anything: below five.

    Order statistics by the sign test (Conover, Practical Nonparametric Statistics, §3.2).
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
    if rank == 0:
        return None
    return Bounds(ordered[rank - 1], ordered[n - rank])


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that `percent` of all values do not exceed (the nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def percentiles(values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}": percentile(values, percent) for percent in (50, 95, 99)}


def summary(values: Sequence[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return {
        "median": median(values),
        "lower_quartile": low,
        "upper_quartile": high,
        "least": min(values),
        "greatest": max(values),
    }
