"""Decides which requests are admitted, and when a refused one should be sent again.

A tenant that floods the queue is refused itself; other tenants are still admitted.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from server.engine.request import GenerationRequest

LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0
"""The bounds of the time after which a refused request should be sent again."""
_REMEMBERED = 64
"""How many of the latest ended requests the pace is measured over."""


class _Pace:
    """Measures how fast requests end, without the time when none is in flight."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._busy = 0.0
        """Seconds with a request in flight, up to the end of the last busy period."""
        self._since: float | None = None
        """When the present busy period began. None: no request is in flight."""
        self._ends = deque([0.0], maxlen=_REMEMBERED + 1)
        """The busy seconds at which the latest requests ended, after the time that they are counted
        from."""

    @property
    def _clock(self) -> float:
        return self._busy if self._since is None else self._busy + self._now() - self._since

    def begin(self) -> None:
        if self._since is None:
            self._since = self._now()

    def end(self) -> None:
        self._ends.append(self._clock)

    def rest(self) -> None:
        """End a busy period: no request is in flight any more."""
        self._busy, self._since = self._clock, None

    def seconds_until(self, ends: int) -> float:
        """Estimate the seconds until this many more requests have ended. Before any has ended, the
        estimate is the busy seconds so far."""
        ended = len(self._ends) - 1
        passed = self._clock - self._ends[0]
        return passed / ended * ends if ended else passed


class Admission:
    """Admits `capacity` requests, and beyond that only those of tenants and adapters with few.

    Once `capacity` requests are in flight, a tenant that has less than an even share of them is
    still admitted until twice as many are; and a tenant's adapter that has less than an even share
    of the tenant's, until one and a half times as many are.
    """

    def __init__(self, capacity: int, now: Callable[[], float] = time.monotonic) -> None:
        self._capacity = capacity
        self.admitted = 0
        """How many requests are in flight."""
        self._of: dict[str, Counter[str]] = {}
        """Tenant -> adapter -> how many requests are in flight."""
        self._now = now
        self._pace = _Pace(now)
        self._promised: dict[str, deque[float]] = {}
        """Tenant -> the times at which its refused requests were told to come back."""

    def admit(self, requests: Sequence[GenerationRequest]) -> bool:
        """Admit all of these requests, or none."""
        for number, request in enumerate(requests):
            if self.admitted >= self._limit_for(request):
                for admitted in requests[:number]:
                    self._discount(admitted)
                return False
            self.admitted += 1
            self._of.setdefault(request.tenant, Counter())[request.adapter] += 1
        self._pace.begin()
        return True

    def leave(self, request: GenerationRequest) -> None:
        """Note that a request has ended."""
        self._pace.end()
        self._discount(request)
        if not self.admitted:
            self._pace.rest()

    def _discount(self, request: GenerationRequest) -> None:
        adapters = self._of[request.tenant]
        self.admitted -= 1
        adapters[request.adapter] -= 1
        if not adapters[request.adapter]:
            del adapters[request.adapter]
        if not adapters:
            del self._of[request.tenant]

    def _limit_for(self, request: GenerationRequest) -> int:
        """The number of requests in flight from which on such a request is refused."""
        adapters = self._of.get(request.tenant, Counter())
        mine = adapters.total()
        if mine < self._capacity // len(self._of.keys() | {request.tenant}):
            return 2 * self._capacity
        if adapters[request.adapter] < mine // len(adapters.keys() | {request.adapter}):
            return self._capacity + self._capacity // 2
        return self._capacity

    def seconds_until_free(self, requests: Sequence[GenerationRequest]) -> float:
        """Estimate the seconds until these refused requests can be admitted.

        By then so many requests must have ended that there is room for them, and for those that
        were told to come back before. Tenants with refused requests share the room equally.
        """
        tenant = requests[0].tenant
        promised = self._outstanding(tenant)
        turn = (len(promised) + len(requests)) * len(self._promised)
        ends = max(self.admitted - self._limit_for(requests[0]) + turn, 1)
        seconds = self._pace.seconds_until(ends)
        if seconds < MOST_SECONDS:
            promised.extend([self._now() + seconds] * len(requests))
        return min(max(seconds, LEAST_SECONDS), MOST_SECONDS)

    def _outstanding(self, tenant: str) -> deque[float]:
        """Forget the times that are past, and return those of a tenant that are not."""
        self._promised.setdefault(tenant, deque())
        for each, times in list(self._promised.items()):
            while times and times[0] <= self._now():
                times.popleft()
            if not times and each != tenant:
                del self._promised[each]
        return self._promised[tenant]
