"""Limits CPU-bound work, in turns among tenants, so that no tenant's queue delays another's."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from infuse.server.engine.errors import QueueFull

_WEIGHT = 0.2
"""The weight of the latest turn in the moving average of their seconds."""


class FairTurns:
    """Limits how many turns are held at once, by all tenants and by each. When some wait, tenants
    get turns one after the other. Belongs to one event loop at a time."""

    def __init__(self, at_once: float, each: int, waiting: int | None = None) -> None:
        """`at_once`: how many turns all tenants may hold; `each`: how many of them one tenant may.
        `waiting`: how many callers of one tenant may wait; None: any number."""
        self._at_once = at_once
        self._each = each
        self._most_waiting = waiting
        self._working: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Tenant -> its callers that wait. The tenant that gets the next turn comes first."""
        self._seconds = 1.0
        """How long a turn takes, as a moving average."""

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn of this tenant and hold it. Raises QueueFull if too many wait already."""
        await self._begin(tenant)
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += _WEIGHT * (time.monotonic() - started - self._seconds)
            self._end(tenant)

    async def _begin(self, tenant: str) -> None:
        if self._working.total() < self._at_once and self._working[tenant] < self._each:
            # Tenants that wait hold as many turns as they may, so this overtakes nobody.
            self._working[tenant] += 1
            return
        line = self._waiting.setdefault(tenant, deque())
        if self._most_waiting is not None and len(line) >= self._most_waiting:
            raise QueueFull(len(line), self._seconds_until_room())
        turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end(tenant)
            else:
                self._leave(tenant, turn)
            raise

    def _end(self, tenant: str) -> None:
        self._working[tenant] -= 1
        if not self._working[tenant]:
            del self._working[tenant]
        for each in list(self._waiting):
            if self._working.total() >= self._at_once:
                return
            if self._working[each] < self._each:
                line = self._waiting.pop(each)
                turn = None
                while line and turn is None:
                    # A cancelled caller may not have run since, and still stands in the line.
                    first = line.popleft()
                    turn = None if first.cancelled() else first
                if line:
                    self._waiting[each] = line
                if turn is not None:
                    self._working[each] += 1
                    turn.set_result(None)

    def _leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        """Take a cancelled caller out of its line, unless `_end` has done so already."""
        line = self._waiting.get(tenant)
        if line is not None and turn in line:
            line.remove(turn)
            if not line:
                del self._waiting[tenant]

    def _seconds_until_room(self) -> float:
        """Estimate the seconds until the first waiting caller of a tenant has had its turn."""
        others = math.ceil(len(self._waiting) / self._at_once)
        return self._seconds * max(1, others)
