"""A token bucket, for the rates of tenants."""

import time
from collections.abc import Callable

_MINUTE = 60.0
_NOTHING = 1e-6
"""What rounding may add to a sum of requests or tokens."""


class Bucket:
    """A token bucket: it fills evenly. Spending may overdraw it, and then nothing fits until the
    debt is paid back.

    How fast it fills (`per_minute`) and how much it holds (`holds`; a minute's worth where that is
    None) may differ from call to call.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._spent = 0.0
        """What has not been filled up again."""
        self._at = now()

    def left(self, per_minute: int, holds: int | None = None) -> float:
        """What is in it; less than 0 where it is overdrawn."""
        self._fill(per_minute)
        return (holds or per_minute) - self._spent

    def seconds_until(
        self, amount: float, per_minute: int | None, holds: int | None = None
    ) -> float:
        """The seconds until `amount` fits, or the bucket is full, if nothing is spent meanwhile; 0
        where it fits now, or there is no limit."""
        if per_minute is None:
            return 0.0
        missing = min(amount, holds or per_minute) - self.left(per_minute, holds)
        return missing * _MINUTE / per_minute if missing > _NOTHING else 0.0

    def spend(self, amount: float, per_minute: int | None) -> None:
        if per_minute is not None:
            self._fill(per_minute)
            self._spent += amount

    def _fill(self, per_minute: int) -> None:
        now = self._now()
        self._spent = max(0.0, self._spent - (now - self._at) * per_minute / _MINUTE)
        self._at = now
