"""Prepares requests on threads: none waits for what another request's adapter brings."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from adapters.vocabulary.sandbox import WouldWait, without_waiting
from server.engine.constraints.grammars import GrammarMissing, RequestGrammars
from server.errors import ApiError
from server.services import Services

_T = TypeVar("_T")

CLIENT_GONE = 499
"""nginx's status for a client that left before its answer; only logs ever see it."""
_AT_ONCE = 2
"""Threads for the requests that wait for one adapter's tokenizer or chat template."""


async def prepared(
    request: Request, services: Services, caller: str | None, prepare: Callable[[], _T]
) -> _T:
    """Run `prepare` on a thread; the caller submits what it returns right after.

    Where it needs a grammar that is not compiled yet, which may take seconds, it is called again
    once that is done: neither a thread nor the engine waits meanwhile. Where it would wait for what
    an adapter brings, it is called again on threads that only requests for that adapter wait for.
    Raises ApiError where the client leaves until then.
    """
    tenant = caller or ""
    grammars = RequestGrammars(services.engine.grammars, tenant, services.cache_scope(caller))

    def without_strangers() -> _T:
        with without_waiting():
            return prepare()

    stranger: CapacityLimiter | None = None
    while True:
        try:
            with grammars.asked():
                if stranger is not None:
                    return await to_thread.run_sync(prepare, limiter=stranger)
                async with services.preparing.turn(tenant):
                    # Inside its turn: an idle engine waits for no request that waits for another.
                    with services.engine.expecting():
                        # The turns bound the threads.
                        own = CapacityLimiter(1)
                        return await to_thread.run_sync(without_strangers, limiter=own)
        except WouldWait as wait:
            stranger = services.strangers.setdefault(wait.key, CapacityLimiter(_AT_ONCE))
        except GrammarMissing as missing:
            await unless_client_leaves(request, grammars.compile(missing))


async def unless_client_leaves(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Return what `work` returns. Raises ApiError with CLIENT_GONE where the client leaves first,
    and whatever `work` raises."""
    result: list[_T] = []
    failure: Exception | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            result.append(await work)
        except Exception as error:
            # Raised inside, the group would wrap it.
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not result:
        raise ApiError(CLIENT_GONE, "The client has left.")
    return result[0]
