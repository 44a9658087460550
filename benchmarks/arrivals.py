"""When requests come: in a closed loop each waits for a place, in an open one nobody waits."""

import random


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Arrival times in seconds, `rate` a second in the mean, whatever the server is at."""
    rng = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        times.append(now)
    return times
