"""Work that takes processors, in turns among tenants: one tenant's long line delays no other's."""

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from server.engine.errors import QueueFull

_WEIGHT = 0.2
"""How much the latest turn counts in what a turn is expected to take."""


class FairTurns:
    """Only so many work at once, and only so many of one tenant; the others wait, and tenants are
    served in turns. Belongs to one event loop at a time."""

    def __init__(self, at_once: int, each: int, waiting: int | None = None) -> None:
        """`each`: of `at_once`, what one tenant may take. `waiting`: how many of one tenant may
        wait; None: any number."""
        self._at_once = at_once
        self._each = each
        self._most_waiting = waiting
        self._working: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Tenant -> those that wait. The tenant whose turn comes next stands first."""
        self._seconds = 1.0
        """What a turn takes."""

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Within: it is this tenant's turn. Raises QueueFull where too many of it wait already."""
        await self._begin(tenant)
        started = time.monotonic()
        try:
            yield
        finally:
            self._seconds += _WEIGHT * (time.monotonic() - started - self._seconds)
            self._end(tenant)

    async def _begin(self, tenant: str) -> None:
        if self._working.total() < self._at_once and self._working[tenant] < self._each:
            # Whoever waits has as many turns as one tenant may have.
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
                    # One that is cancelled may not have noticed yet.
                    first = line.popleft()
                    turn = None if first.cancelled() else first
                if line:
                    self._waiting[each] = line
                if turn is not None:
                    self._working[each] += 1
                    turn.set_result(None)

    def _leave(self, tenant: str, turn: asyncio.Future[None]) -> None:
        """A cancelled one goes, unless its line has passed it over already."""
        line = self._waiting.get(tenant)
        if line is not None and turn in line:
            line.remove(turn)
            if not line:
                del self._waiting[tenant]

    def _seconds_until_room(self) -> float:
        """Until the first of a tenant that waits has had its turn."""
        others = math.ceil(len(self._waiting) / self._at_once)
        return self._seconds * max(1, others)
