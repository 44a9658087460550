"""Knows the requests that are prepared now, before the engine has them."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum

from infuse.server import request_id


class Awaits(StrEnum):
    """What a request waits for before it is submitted to the engine."""

    TURN = "turn"
    """Others are prepared."""
    GRAMMAR = "grammar"
    """Its grammar is compiled."""
    FILES = "files"
    """A tokenizer or a chat template of its adapter's own is read or run."""


@dataclass(eq=False, slots=True)
class Preparation:
    """A request that is prepared."""

    request_id: str
    tenant: str
    began: float
    """By `time.perf_counter`."""
    awaits: Awaits | None = None
    """None: nothing, its prompt is made now."""


class Preparations:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._running: dict[Preparation, None] = {}

    @contextmanager
    def begin(self, tenant: str) -> Iterator[Preparation]:
        """Within: the current request is prepared."""
        preparation = Preparation(request_id.current.get() or "", tenant, time.perf_counter())
        self._running[preparation] = None
        try:
            yield preparation
        finally:
            del self._running[preparation]

    def __iter__(self) -> Iterator[Preparation]:
        """The longest under way first."""
        return iter(list(self._running))
