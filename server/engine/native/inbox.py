"""Requests on their way into the engine, and those that are about to come."""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from server.engine.request import GenerationRequest

GATHERING_SECONDS = 0.2
"""What an idle engine waits at most for requests that are being made ready: 32 with cold adapters
take half of it."""


class Inbox:
    """Whoever calls it holds `changed`, but for `expecting`, which takes it."""

    def __init__(self, changed: threading.Condition, rows: int, tokens: int) -> None:
        """`rows`, `tokens`: of a step's prompts, at most."""
        self._changed = changed
        self._rows = rows
        self._tokens = tokens
        self._requests: deque[GenerationRequest] = deque()
        self._expected = 0
        """Requests that are being made ready."""

    def __bool__(self) -> bool:
        return bool(self._requests)

    def put(self, requests: Iterable[GenerationRequest]) -> None:
        self._requests.extend(requests)
        self._changed.notify()

    def take_all(self) -> Iterator[GenerationRequest]:
        while self._requests:
            yield self._requests.popleft()

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Within: a request is made ready that will be put in right after, unless this raises.

        A step with two of 32 prompts takes a quarter of one with all: an idle engine waits for
        those that are about to come, a moment at most.
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
        """Wait until no more is on its way, or a step could not take it."""
        self._changed.wait_for(self._is_worth_a_step, GATHERING_SECONDS)

    def _is_worth_a_step(self) -> bool:
        if not self._expected:
            return True
        tokens = sum(len(request.prompt) for request in self._requests)
        return tokens >= self._tokens or len(self._requests) >= self._rows
