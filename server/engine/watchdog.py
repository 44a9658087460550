"""Notices when what computes hangs. What is known of a step's cost tells a long one from a hang."""

import threading
import time
from collections.abc import Callable

_MANY = 10
"""How many times as long as expected work may take."""
_SECOND = 1.0


class Watchdog:
    """Calls `bark` on a thread of its own, once, where work takes far longer than it should.

    Who computes says when a piece of work begins, and when there is none. It counts only the time
    in which this process runs: one that was stopped and goes on has not hung.
    """

    def __init__(
        self,
        patience: float,
        bark: Callable[[], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`patience`: seconds that any piece of work may take."""
        self._patience = patience
        self._bark = bark
        self._now = now
        self._works = 0
        """How many pieces of work have begun or ended."""
        self._limit: float | None = None
        """Seconds that the present work may take. None: there is none."""
        self._seen = 0
        """What `_works` was when the watchdog last looked."""
        self._age = 0.0
        """Seconds that it has seen the present work take."""
        self._looked = now()
        self._ended = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def begin(self, expected: float = 0.0, pieces: float = 1.0) -> None:
        """Work begins: what was before it has ended. `expected`: the seconds that it should take;
        0: nobody knows. `pieces`: how many times as much it may be as other work."""
        self._limit = max(self._patience * pieces, _MANY * expected)
        self._works += 1

    def rest(self) -> None:
        """Nothing is to be done now."""
        self._limit = None
        self._works += 1

    def end(self) -> None:
        self._ended.set()

    def look(self) -> bool:
        """Whether the present work has hung. To be called about once a second."""
        now, works, limit = self._now(), self._works, self._limit
        # Two seconds at most: more have passed only where this process was stopped meanwhile.
        passed, self._looked = min(now - self._looked, 2 * _SECOND), now
        self._age = 0.0 if works != self._seen else self._age + passed
        self._seen = works
        return limit is not None and self._age > limit

    def _watch(self) -> None:
        while not self._ended.wait(_SECOND):
            if self.look():
                self._bark()
                return
