"""Which requests are admitted when many are in flight, and when refused ones may come back: who
floods the queue is refused before others are."""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from server.engine.request import GenerationRequest

LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0
"""Until a refused request is to come back."""
_REMEMBERED = 64
"""Ends of requests that the pace is taken from."""


class _Pace:
    """How fast requests end, in the seconds in which there are any."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._busy = 0.0
        """Seconds with a request in flight, before those that run now."""
        self._since: float | None = None
        """When the first of those that run now came."""
        self._ends = deque([0.0], maxlen=_REMEMBERED + 1)
        """The busy seconds at which the latest ended, and where the count begins."""

    @property
    def _clock(self) -> float:
        return self._busy if self._since is None else self._busy + self._now() - self._since

    def begin(self) -> None:
        if self._since is None:
            self._since = self._now()

    def end(self) -> None:
        self._ends.append(self._clock)

    def rest(self) -> None:
        """Nothing is in flight."""
        self._busy, self._since = self._clock, None

    def seconds_until(self, ends: int) -> float:
        """Until so many more have ended. Before the first has: as long as it has not come."""
        ended = len(self._ends) - 1
        passed = self._clock - self._ends[0]
        return passed / ended * ends if ended else passed


class Places:
    """So many requests may be in flight. Once they are, a tenant with less than an even part of
    them may have up to as many again taken; and up to half as many, an adapter with less than an
    even part of what its tenant has."""

    def __init__(self, places: int, now: Callable[[], float] = time.monotonic) -> None:
        self._places = places
        self.taken = 0
        """How many requests are in flight."""
        self._of: dict[str, Counter[str]] = {}
        """Tenant -> adapter -> how many are taken."""
        self._now = now
        self._pace = _Pace(now)
        self._promised: dict[str, deque[float]] = {}
        """Tenant -> when those that were refused come back, each to a place of its own."""

    def take(self, requests: Sequence[GenerationRequest]) -> bool:
        """A place for each, or for none."""
        for number, request in enumerate(requests):
            if not self._may_take(request):
                for taken in requests[:number]:
                    self._give_back(taken)
                return False
            self.taken += 1
            self._of.setdefault(request.tenant, Counter())[request.adapter] += 1
        self._pace.begin()
        return True

    def leave(self, request: GenerationRequest) -> None:
        """A request has ended."""
        self._pace.end()
        self._give_back(request)
        if not self.taken:
            self._pace.rest()

    def _give_back(self, request: GenerationRequest) -> None:
        adapters = self._of[request.tenant]
        self.taken -= 1
        adapters[request.adapter] -= 1
        if not adapters[request.adapter]:
            del adapters[request.adapter]
        if not adapters:
            del self._of[request.tenant]

    def _may_take(self, request: GenerationRequest) -> bool:
        return self.taken < self._most_for(request)

    def _most_for(self, request: GenerationRequest) -> int:
        """How many places there are for a request like this."""
        adapters = self._of.get(request.tenant, Counter())
        mine = adapters.total()
        if mine < self._places // len(self._of.keys() | {request.tenant}):
            return 2 * self._places
        if adapters[request.adapter] < mine // len(adapters.keys() | {request.adapter}):
            return self._places + self._places // 2
        return self._places

    def seconds_until_free(self, requests: Sequence[GenerationRequest]) -> float:
        """When these requests, which were refused, are to come back: as many requests will have
        ended then as take their places, and the places of those that were told so before.

        Tenants that were refused share what becomes free.
        """
        tenant = requests[0].tenant
        promised = self._outstanding(tenant)
        turn = (len(promised) + len(requests)) * len(self._promised)
        ends = max(self.taken - self._most_for(requests[0]) + turn, 1)
        seconds = self._pace.seconds_until(ends)
        if seconds < MOST_SECONDS:
            promised.extend([self._now() + seconds] * len(requests))
        return min(max(seconds, LEAST_SECONDS), MOST_SECONDS)

    def _outstanding(self, tenant: str) -> deque[float]:
        """When those of a tenant that were refused come back, but for those that have."""
        self._promised.setdefault(tenant, deque())
        for each, times in list(self._promised.items()):
            while times and times[0] <= self._now():
                times.popleft()
            if not times and each != tenant:
                del self._promised[each]
        return self._promised[tenant]
