"""What a tenant uses of the server, for the limits of its scope."""

import time
from collections.abc import Callable

_MINUTE = 60.0
_NOTHING = 1e-6
"""What rounding may add to a sum of requests or tokens."""


class Bucket:
    """A token bucket: it holds a minute's worth, and fills evenly. Spending may overdraw it, and
    then nothing fits until the debt is paid back. The limit may differ from call to call."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._spent = 0.0
        """What has not been filled up again."""
        self._at = now()

    def seconds_until(self, amount: float, per_minute: int | None) -> float:
        """The seconds until `amount` fits, or the bucket is full, if nothing is spent meanwhile; 0
        where it fits now."""
        if per_minute is None:
            return 0.0
        self._fill(per_minute)
        missing = self._spent + min(amount, per_minute) - per_minute
        return missing * _MINUTE / per_minute if missing > _NOTHING else 0.0

    def spend(self, amount: float, per_minute: int | None) -> None:
        if per_minute is not None:
            self._fill(per_minute)
            self._spent += amount

    def _fill(self, per_minute: int) -> None:
        now = self._now()
        self._spent = max(0.0, self._spent - (now - self._at) * per_minute / _MINUTE)
        self._at = now


class Usage:
    """What the requests of one tenant use. Belongs to one event loop."""

    def __init__(self) -> None:
        self.requests = Bucket()
        self.tokens = Bucket()
        self.at_once = 0
        """HTTP requests that are not answered yet."""
        self.queued = 0
        """Requests to the engine that have not ended."""
