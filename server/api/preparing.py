"""Prepares requests on threads. No request waits for what another request's adapter brings."""

from collections.abc import Callable
from typing import TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from infuse.adapters.vocabulary.sandbox import WouldWait, without_waiting
from infuse.server.api.deadlines import Deadline
from infuse.server.api.disconnects import unless_client_leaves
from infuse.server.caller import Caller
from infuse.server.engine.constraints.grammars import GrammarMissing, RequestGrammars
from infuse.server.preparations import Awaits, Preparation
from infuse.server.services import Services

_T = TypeVar("_T")

_AT_ONCE = 2
"""Threads for the requests that wait for one adapter's tokenizer or chat template."""


async def prepared(
    request: Request,
    services: Services,
    caller: Caller,
    deadline: Deadline,
    prepare: Callable[[], _T],
) -> _T:
    """Run `prepare` on a thread; the caller submits what it returns right after.

    It runs again where it has to wait. A grammar that is not compiled yet, which may take seconds,
    is compiled first: neither a thread nor the engine waits meanwhile. What an adapter brings is
    read or run on threads that only requests for that adapter wait for. Raises ApiError where the
    client leaves meanwhile, the deadline comes, or the caller's rate is used up.
    """
    # Where not even one token is left, the prompt need not be tokenised.
    caller.check_tokens(1)
    # What waits is cancelled then; a thread ends its work, and the result counts.
    with (
        anyio.move_on_after(deadline.seconds_left),
        services.preparations.begin(caller.name or "") as preparation,
    ):
        return await _prepared(request, services, caller, prepare, preparation)
    raise deadline.exceeded()


async def _prepared(
    request: Request,
    services: Services,
    caller: Caller,
    prepare: Callable[[], _T],
    preparation: Preparation,
) -> _T:
    tenant = preparation.tenant
    scope = services.cache_scope(caller.name)
    grammars = RequestGrammars(services.engine.grammars, tenant, scope)
    own_files: CapacityLimiter | None = None
    while True:
        try:
            with grammars.asked():
                if own_files is not None:
                    preparation.awaits = Awaits.FILES
                    return await to_thread.run_sync(prepare, limiter=own_files)
                preparation.awaits = Awaits.TURN
                async with services.preparing.turn(tenant):
                    preparation.awaits = None
                    # Inside its turn: an idle engine waits for no request that waits for another.
                    with services.engine.expecting():
                        # The turns bound the threads.
                        own = CapacityLimiter(1)
                        return await to_thread.run_sync(_without_waiting, prepare, limiter=own)
        except WouldWait as wait:
            own_files = services.own_files.setdefault(wait.key, CapacityLimiter(_AT_ONCE))
        except GrammarMissing as missing:
            preparation.awaits = Awaits.GRAMMAR
            await unless_client_leaves(request, grammars.compile(missing))


def _without_waiting(prepare: Callable[[], _T]) -> _T:
    with without_waiting():
        return prepare()
