"""Decides which requests are admitted, and when a refused one should be sent again.

A tenant that floods the queue is refused itself; other tenants are still admitted.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from infuse.server.engine.errors import QueueFull, WaitTooLong
from infuse.server.engine.fair_queue import least_charge
from infuse.server.engine.request import GenerationRequest

LEAST_SECONDS, MOST_SECONDS = 1.0, 60.0
"""The bounds of the time after which a refused request should be sent again."""
_OVERLOADED_FROM, _OVERLOADED_TO = 0.9, 0.7
"""The load at which the overload begins, and the load at which it is over."""
_NEWCOMER = "\0"
"""The name of a tenant that has no requests: no key has it."""
_REMEMBERED = 64
"""How many of the latest ended requests the pace is measured over; twice the rows where that is
more, as the rows of a batch may end together."""


class _Pace:
    """Measures how fast requests end while all rows are in use.

    Its clock goes by the share of the rows that are in use: a request that ran alone says little of
    how fast a full batch ends.
    """

    def __init__(self, rows: int, now: Callable[[], float]) -> None:
        self._rows = rows
        self._now = now
        self._busy = 0.0
        """What the clock said when the number of requests last changed."""
        self._since = now()
        """When that was."""
        self._share = 0.0
        """The share of the rows that are in use since."""
        self._ends = deque([0.0], maxlen=max(_REMEMBERED, 2 * rows) + 1)
        """What the clock said when the latest requests ended, after the time that they are counted
        from."""

    @property
    def _clock(self) -> float:
        return self._busy + self._share * (self._now() - self._since)

    def change(self, in_flight: int) -> None:
        """Note that so many requests are in flight from now on."""
        self._busy, self._since = self._clock, self._now()
        self._share = min(1.0, in_flight / self._rows)

    def end(self) -> None:
        self._ends.append(self._clock)

    @property
    def is_known(self) -> bool:
        """Whether so many requests have ended that the first of them, which may have begun
        together, do not mislead."""
        return len(self._ends) > self._rows

    def seconds_until(self, ends: int) -> float:
        """Estimate the seconds until this many more requests have ended. Before any has ended, the
        estimate is the busy seconds so far."""
        ended = len(self._ends) - 1
        passed = self._clock - self._ends[0]
        return passed / ended * ends if ended else passed


class Admission:
    """Admits requests that need not wait too long: as many as there are rows and places in the
    queue, and beyond that only those of tenants and adapters with few.

    Once so many requests are in flight, a tenant that has less than its share of them is still
    admitted until twice as many are; and a tenant's adapter that has less than an even share of the
    tenant's, until one and a half times as many are. None is refused for its wait before as
    many requests have ended as there are rows: until then nobody knows how long it is.
    """

    def __init__(
        self,
        *,
        rows: int,
        queue: int,
        longest_wait: float = math.inf,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`rows`: how many requests run at once; `queue`: how many may wait beside them;
        `longest_wait`: for how many seconds."""
        self._rows = rows
        self._capacity = rows + queue
        self._longest_wait = longest_wait
        self.admitted = 0
        """How many requests are in flight."""
        self._of: dict[str, Counter[str]] = {}
        """Tenant -> adapter -> how many requests are in flight."""
        self._weights: dict[str, float] = {}
        """Tenant with requests in flight -> its weight."""
        self._tokens: Counter[str] = Counter()
        """Tenant -> the tokens that its requests in flight are charged at least."""
        self._now = now
        self._pace = _Pace(rows, now)
        self._promised: dict[str, deque[float]] = {}
        """Tenant -> the times at which its refused requests were told to come back."""
        self._was_overloaded = False

    def admit(self, requests: Sequence[GenerationRequest]) -> bool:
        """Admit all of these requests, or none."""
        if self._wait_beyond(requests[0]) > 0:
            return False
        for number, request in enumerate(requests):
            if self.admitted >= self._limit_for(request):
                for admitted in requests[:number]:
                    self._discount(admitted)
                return False
            self.admitted += 1
            self._of.setdefault(request.tenant, Counter())[request.adapter] += 1
            self._weights[request.tenant] = request.weight
            self._tokens[request.tenant] += least_charge([request])
        self._pace.change(self.admitted)
        return True

    def refusal(self, requests: Sequence[GenerationRequest]) -> QueueFull | WaitTooLong:
        """Why these requests are not admitted, and when they should be sent again."""
        first, seconds = requests[0], self.seconds_until_free(requests)
        if self._wait_beyond(first) > 0:
            return WaitTooLong(
                self._wait_of(first), min(self._longest_wait, first.patience), seconds
            )
        return QueueFull(max(0, self.admitted - self._rows), seconds)

    def leave(self, request: GenerationRequest) -> None:
        """Note that a request has ended."""
        self._pace.end()
        self._discount(request)
        self._pace.change(self.admitted)

    def _discount(self, request: GenerationRequest) -> None:
        adapters = self._of[request.tenant]
        self.admitted -= 1
        adapters[request.adapter] -= 1
        self._tokens[request.tenant] -= least_charge([request])
        if not adapters[request.adapter]:
            del adapters[request.adapter]
        if not adapters:
            del self._of[request.tenant], self._weights[request.tenant]
            del self._tokens[request.tenant]

    def _limit_for(self, request: GenerationRequest) -> int:
        """The number of requests in flight from which on such a request is refused."""
        adapters = self._of.get(request.tenant, Counter())
        mine = adapters.total()
        all_weights = self._weight_of_all(request.tenant, request.weight)
        if mine < self._capacity * request.weight // all_weights:
            return 2 * self._capacity
        if adapters[request.adapter] < mine // len(adapters.keys() | {request.adapter}):
            return self._capacity + self._capacity // 2
        return self._capacity

    @property
    def wait_seconds(self) -> float:
        """Estimate how long a newcomer's request would wait. Any thread may read this."""
        return self._wait(_NEWCOMER if self._has_tenants else "", 1.0)

    @property
    def is_overloaded(self) -> bool:
        """Whether a newcomer's request is nearly refused, or was and is not far from it yet. The
        flood of one of several tenants is no overload. Any thread may read this."""
        limit = 2 * self._capacity if self._has_tenants else self._capacity
        load = max(self.admitted / limit, self.wait_seconds / self._longest_wait)
        begins = _OVERLOADED_TO if self._was_overloaded else _OVERLOADED_FROM
        self._was_overloaded = load >= begins
        return self._was_overloaded

    @property
    def _has_tenants(self) -> bool:
        """Without keys all requests are of one tenant, whose name is empty."""
        return any(self._of)

    def _wait(self, tenant: str, weight: float) -> float:
        """Estimate the seconds until a further request of this tenant would start."""
        ends = self._ends_before(tenant, weight)
        return self._pace.seconds_until(ends) if ends and self._pace.is_known else 0.0

    def _wait_of(self, request: GenerationRequest) -> float:
        """Estimate the seconds until a request would start: by its tenant's share, or by what the
        tenant is guaranteed where that is sooner."""
        by_share = self._wait(request.tenant, request.weight)
        if not by_share or not request.guaranteed:
            return by_share
        before = self._tokens[request.tenant] * 60 / request.guaranteed
        return min(by_share, max(before, self._pace.seconds_until(1)))

    def _ends_before(self, tenant: str, weight: float) -> int:
        """Estimate how many requests end before a further one of this tenant starts.

        Tenants start in proportion to their weights, and nobody waits for more than all that came
        before.
        """
        in_order = self.admitted + 1 - self._rows
        own = self._of.get(tenant, Counter()).total()
        by_share = math.ceil((own + 1) * self._weight_of_all(tenant, weight) / weight) - self._rows
        return 0 if in_order <= 0 else max(1, min(in_order, by_share))

    def _weight_of_all(self, tenant: str, weight: float) -> float:
        """The weights of a tenant and of all others that have requests in flight."""
        others = sum(self._weights.values()) - self._weights.get(tenant, 0.0)
        return others + weight

    def _wait_beyond(self, request: GenerationRequest) -> float:
        """By how many seconds a request would wait longer than it can, or than it may."""
        return self._wait_of(request) - min(self._longest_wait, request.patience)

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
        beyond = self._wait_beyond(requests[0])
        if beyond > 0:
            seconds = max(seconds, beyond + self._pace.seconds_until(turn))
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
