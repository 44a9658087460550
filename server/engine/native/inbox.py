"""Holds submitted requests until the engine takes them, and counts those being prepared."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from infuse.server.engine.fair_queue import least_charge
from infuse.server.engine.request import GenerationRequest, adapter_names

GATHERING_SECONDS = 0.2
"""The longest that an idle engine waits for requests that are being prepared. Preparing 32 requests
with cold adapters takes half of it."""


class Inbox:
    """The queue between the threads that submit requests and the engine's.

    Callers hold the condition `changed`, except for `expecting`, which acquires it.
    """

    def __init__(self, changed: threading.Condition, rows: int, tokens: int) -> None:
        """`rows` and `tokens`: how many prompts, and tokens of them, a step takes at most."""
        self._changed = changed
        self._rows = rows
        self._tokens = tokens
        self._requests: deque[GenerationRequest] = deque()
        self._expected = 0
        """How many requests are being prepared."""

    def __bool__(self) -> bool:
        return bool(self._requests)

    @property
    def adapters(self) -> frozenset[str]:
        """The adapters that the queued requests name. Needs no condition: it reads a copy."""
        return adapter_names(self._requests.copy())

    @property
    def tokens(self) -> int:
        """What the queued requests are charged at least. Needs no condition, as `adapters`."""
        return least_charge(self._requests.copy())

    def put(self, requests: Iterable[GenerationRequest]) -> None:
        self._requests.extend(requests)
        self._changed.notify()

    def take_all(self) -> Iterator[GenerationRequest]:
        while self._requests:
            yield self._requests.popleft()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce a request. The context prepares it; it is put in right after, unless the
        context raises.

        An idle engine waits a moment for announced requests: a step with two prompts takes a
        quarter of the time of a step with 32.
        """
        with self._changed:
            self._expected += 1
        comes = False
        try:
            yield
            comes = True
        finally:
            with self._changed:
                self._expected -= 1
                if not (comes or self._expected):
                    self._changed.notify_all()

    def gather(self) -> None:
        """Wait until no request is being prepared, or there are enough for a step."""
        self._changed.wait_for(self._is_worth_a_step, GATHERING_SECONDS)

    def _is_worth_a_step(self) -> bool:
        if not self._expected:
            return True
        tokens = sum(len(request.prompt) for request in self._requests)
        return tokens >= self._tokens or len(self._requests) >= self._rows
