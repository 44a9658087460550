"""Servers that share a store: each shows how far it has read the journal.

    replicas/<id>.json   {"seconds": 10.0, "applied": 301, "beat": 7}

A server shows itself, reads the journal, and then answers from what it has read, for less than
`seconds` after it began. A server that has changed something waits until every other one has read
the change, or until `seconds` have passed since: whoever has not read it by then answers no more.
Each measures durations with its own clock, and there is a margin between the two.

docs/decisions/0041-several-servers-on-one-store.md says why that is enough.
"""

import json
import logging
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from infuse.adapters.errors import AdapterError, StoreUnreachable
from infuse.adapters.storage.chain import Event

if TYPE_CHECKING:
    from infuse.adapters.storage.objects import Objects

log = logging.getLogger(__name__)

LEASE_SECONDS = 10.0
_PREFIX = "replicas"
_MARGIN = 0.8
"""The share of its lease for which a server answers: clocks may run at different speeds."""
_RENEWALS = 5
"""How often a server shows itself anew in the time of a lease."""
_LOOKS = 50
"""How often a server looks for changes in the time of a lease."""


class Followed(Protocol):
    """What a server follows: see `Storage`."""

    @property
    def last(self) -> int: ...

    def read(self) -> Sequence[Event]: ...

    def settle(self) -> Sequence[Event]: ...


class Replicas:
    """This server among those that share a store. One thread at a time follows and leaves; any
    thread may ask and wait."""

    def __init__(self, objects: "Objects", seconds: float = LEASE_SECONDS) -> None:
        """`seconds`: how long this server may answer without reaching the store, at most."""
        self._objects = objects
        self._seconds = seconds
        self.pause = seconds / _LOOKS
        """Seconds between two looks for changes."""
        self._key: str | None = None
        self._applied = 0
        """The number that this server shows."""
        self._beat = 0
        self._begun = -math.inf
        """When the last showing of this server began."""
        self._until = -math.inf
        """Until when this server knows all changes that others have acknowledged."""

    @property
    def is_current(self) -> bool:
        return _now() < self._until

    def check(self) -> None:
        """Raises StoreUnreachable where others may have made changes that are not known here."""
        if _now() >= self._until:
            raise StoreUnreachable(
                f"This server has not reached {self._objects.url} for a while, so it cannot know "
                "what other servers have changed there: ask another one, or try again."
            )

    def follow(self, storage: Followed, take_in: Callable[[Sequence[Event]], None]) -> None:
        """Read what other servers have appended, and show them how far this one has read."""
        if self.is_current:
            self._renew(storage.last)
            events = storage.settle()
        else:
            self._join(storage.last)
            events = storage.read()
        take_in(events)
        self._until = self._begun + _MARGIN * self._seconds
        self._renew(storage.last)

    def _join(self, applied: int) -> None:
        """Show this server under a new key: another one may be about to remove the key of a server
        that was away."""
        self.leave()
        self._key = f"{_PREFIX}/{uuid.uuid4().hex}.json"
        self._show(applied)

    def _renew(self, applied: int) -> None:
        """Show this server again, where it is time to or where it has read on since."""
        if applied != self._applied or _now() >= self._begun + self._seconds / _RENEWALS:
            self._show(applied)
            # Whoever sees a key unchanged for too long removes it.
            self.check()

    def leave(self) -> None:
        """Answer no more, and let nobody wait for this server."""
        self._until = -math.inf
        if self._key is not None:
            _remove(self._objects, [self._key])

    @property
    def is_alone(self) -> bool:
        """Whether no other server shows itself. False where that cannot be known."""
        with suppress(AdapterError):
            return not self._others()
        return False

    def all_have(self) -> int:
        """Return the number up to which every other server has read."""
        return min((_read(text)[0] for text in self._others().values()), default=sys.maxsize)

    def wait_for(self, number: int) -> None:
        """Wait until every other server has read up to a number, or answers no more."""
        first = behind = self._behind(number)
        begun = time.monotonic()
        while any(time.monotonic() < begun + _read(text)[1] for text in behind.values()):
            time.sleep(self.pause / 2)
            behind = self._behind(number)
        # A server whose key did not change for so long has gone, or takes a new one.
        _remove(self._objects, [key for key, text in behind.items() if first.get(key) == text])

    def _show(self, applied: int) -> None:
        assert self._key is not None
        begun = _now()
        self._beat += 1
        values = {"seconds": self._seconds, "applied": applied, "beat": self._beat}
        self._objects.put(self._key, json.dumps(values).encode())
        self._begun, self._applied = begun, applied

    def _behind(self, number: int) -> dict[str, bytes]:
        return {key: text for key, text in self._others().items() if _read(text)[0] < number}

    def _others(self) -> dict[str, bytes]:
        keys = [key for key in self._objects.list(_PREFIX) if key != self._key]
        texts = zip(keys, self._objects.get_all(keys), strict=True)
        return {key: text for key, text in texts if text is not None}


class Follower:
    """A thread that follows what other servers change."""

    def __init__(self, replicas: Replicas, follow: Callable[[], None]) -> None:
        self._replicas = replicas
        self._follow = follow
        self.failures = 0
        """How many attempts have failed since the latest that did not."""
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-follower", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        failure = ""
        while not self._stopped.wait(self._replicas.pause):
            try:
                self._follow()
                failure, self.failures = "", 0
            except (AdapterError, OSError) as error:
                self.failures += 1
                if str(error) != failure:
                    failure = str(error)
                    log.warning("Changes of other servers cannot be read now: %s", error)


def _read(text: bytes) -> tuple[int, float]:
    """Return what a server shows: how far it has read, and how long that counts."""
    try:
        values = json.loads(text)
        return int(values["applied"]), float(values["seconds"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0, LEASE_SECONDS


def _remove(objects: "Objects", keys: Sequence[str]) -> None:
    try:
        objects.delete(keys)
    except AdapterError as error:
        log.warning("Nothing is lost, but a clean-up has failed: %s", error)


def _now() -> float:
    """Return seconds of a clock that runs on while the machine sleeps, where there is one: a server
    that slept must not believe that no time has passed."""
    return time.clock_gettime(_CLOCK)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
