"""On which threads requests are made ready, so that nobody waits for what another one brings."""

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from adapters.sandbox import WouldWait, without_waiting
from server.services import Services

_T = TypeVar("_T")

_AT_ONCE = 2
"""Requests that wait for one adapter's tokenizer or chat template."""


async def prepared(services: Services, is_constrained: bool, prepare: Callable[[], _T]) -> _T:
    """What `prepare` makes on a thread, to be submitted right after.

    A grammar may take seconds: the engine does not wait for one, and only a few are made at once.
    So may what an adapter brings: nobody else waits for that.
    """

    def without_strangers() -> _T:
        with without_waiting():
            return prepare()

    try:
        if is_constrained:
            return await to_thread.run_sync(without_strangers, limiter=services.compiling)
        with services.engine.expecting():
            return await to_thread.run_sync(without_strangers, limiter=services.preparing)
    except WouldWait as wait:
        limiter = services.strangers.setdefault(wait.key, CapacityLimiter(_AT_ONCE))
        return await to_thread.run_sync(prepare, limiter=limiter)
