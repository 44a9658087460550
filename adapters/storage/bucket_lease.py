"""The lease of a bucket: one object, lease/<number>, that its owner replaces by the next number.

Objects are created, never overwritten, so only one process gets the next number. Clocks of two
machines are never compared: a lease has run out when it was seen unchanged for its duration. The
lease keeps a second server from starting; the journal makes sure that no two processes write.
"""

import json
import logging
import re
import threading
import time
from contextlib import suppress

from infuse.adapters.errors import AdapterError, StoreLocked
from infuse.adapters.storage.objects import Objects

log = logging.getLogger(__name__)

_PREFIX = "lease"
_KEY = re.compile(rf"{_PREFIX}/(\d{{12}})\.json")


class Lease:
    """The constructor takes the lease; a thread renews it until it is released.

    Raises StoreLocked where another owner renews it. Where another owner has died, the constructor
    waits until its lease runs out; where `owner` itself has died, it does not wait.
    """

    def __init__(self, objects: Objects, owner: str, seconds: float, renew_every: float) -> None:
        self._objects = objects
        self._renew_every = renew_every
        self._owner = owner
        self._mine = json.dumps({"owner": owner, "seconds": seconds}).encode()
        self._number = self._take()
        self._lost = False
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="bucket-lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let the next owner take the bucket without a wait. A second call does nothing: the lease
        may be the next owner's by then."""
        if self._released.is_set():
            return
        self.stop()
        if self._lost:
            return
        try:
            self._objects.delete([_key(self._number)])
        except AdapterError as error:
            log.warning("The lease on %s runs out by itself: %s", self._objects.url, error)

    def stop(self) -> None:
        """Let the lease run out by itself."""
        self._released.set()
        self._thread.join()

    def _take(self) -> int:
        begun = time.monotonic()
        first: int | None = None
        while True:
            numbers = self._numbers()
            latest = max(numbers, default=0)
            holder, seconds = self._holder(latest)
            if first is None:
                first = latest
                log.info("%s is owned by %s.", self._objects.url, holder or "nobody")
            if holder in ("", self._owner) or time.monotonic() - begun >= seconds:
                if not self._put(latest + 1):
                    continue
                self._objects.delete([_key(number) for number in numbers])
                return latest + 1
            if latest != first:
                raise StoreLocked(f"another server, {holder}, uses {self._objects.url}")
            time.sleep(min(seconds, self._renew_every) / 10)

    def _renew(self) -> None:
        while not self._released.wait(self._renew_every):
            try:
                self._renew_once()
                if self._lost:
                    log.error(
                        "The lease on %s was taken over by another server.", self._objects.url
                    )
                    return
            except AdapterError as error:
                log.warning("The lease on %s was not renewed: %s", self._objects.url, error)

    def _renew_once(self) -> None:
        still = self._objects.get(_key(self._number)) == self._mine
        if not still or not self._put(self._number + 1):
            self._lost = True
            return
        self._number += 1
        self._objects.delete([_key(self._number - 1)])

    def _put(self, number: int) -> bool:
        return (
            self._objects.create(_key(number), self._mine)
            or self._objects.get(_key(number)) == self._mine
        )

    def _holder(self, number: int) -> tuple[str, float]:
        """Return who holds a lease, and for how many seconds; an empty name where it is gone."""
        text = self._objects.get(_key(number)) if number else None
        if text is None:
            return "", 0.0
        try:
            values = json.loads(text)
            return str(values["owner"]), float(values["seconds"])
        except (ValueError, KeyError, TypeError):
            return "", 0.0

    def _numbers(self) -> list[int]:
        found = map(_KEY.fullmatch, self._objects.list(_PREFIX))
        return [int(key[1]) for key in found if key is not None]


class SharedLease(Lease):
    """The lease that all servers which share a bucket hold together: each renews it."""

    def __init__(self, objects: Objects, seconds: float = 30.0, renew_every: float = 5.0) -> None:
        self._seconds = seconds
        self._begun = time.monotonic()
        super().__init__(objects, "servers with --shared-store", seconds, renew_every)

    def release(self) -> None:
        with suppress(AdapterError):
            # Another server may have renewed it last.
            self._renew_once()
        super().release()

    def check(self) -> None:
        """Raises StoreLocked where another owner may have taken the bucket over."""
        if time.monotonic() > self._begun + self._seconds / 2:
            raise StoreLocked(f"the lease on {self._objects.url} could not be renewed")

    def _renew_once(self) -> None:
        begun = time.monotonic()
        self._number = self._take()
        self._begun = begun


def _key(number: int) -> str:
    return f"{_PREFIX}/{number:012}.json"
