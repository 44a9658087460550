"""Ends work when the client of its request closes the connection."""

from collections.abc import Coroutine
from typing import Any, TypeVar

import anyio
from starlette.requests import Request

from infuse.server.errors import CLIENT_GONE, ApiError

_T = TypeVar("_T")


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
