"""ASGI middleware of the application that has no file of its own."""

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.adapters.storage.stored import StoredAdapters
from infuse.server.errors import ApiError, error_response
from infuse.server.settings import Settings

_UPLOADS = "/v1/adapters"
_SLOWEST = 16 << 10
"""A body has one second more for each so many bytes that have arrived."""
_CATCHING_UP = 1.0
"""Seconds for which a request waits until this server knows what others have changed."""
_LOOK = 0.01
"""Seconds between two looks whether it does."""


class HeadAsGet:
    """ASGI middleware that lets routes for GET answer HEAD too. The server sends no body for it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class CatchUp:
    """ASGI middleware that lets a request wait, for a second at most, while this server reads what
    others have changed since it was stopped or had no processor."""

    def __init__(self, app: ASGIApp, stored: StoredAdapters) -> None:
        self._app = app
        self._stored = stored
        self._is_in_vain = False
        """Whether a request has waited for so long, and nothing was read since."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._stored.is_behind:
            await self._wait()
        else:
            self._is_in_vain = False
        await self._app(scope, receive, send)

    async def _wait(self) -> None:
        deadline = time.monotonic() + _CATCHING_UP
        while self._stored.is_behind and not self._is_in_vain:
            self._is_in_vain = time.monotonic() > deadline
            await asyncio.sleep(_LOOK)


class LimitBodies:
    """ASGI middleware that refuses bodies over their limit, by the header or while they arrive, and
    bodies that arrive too slowly."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._upload_limit = settings.form_bytes
        self._body_limit = settings.max_body_bytes
        self._seconds = settings.receive_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        form = headers.get(b"content-type", b"").startswith(b"multipart/form-data")
        upload = form and str(scope["path"]).startswith(_UPLOADS)
        limit = self._upload_limit if upload else self._body_limit
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > limit:
            refusal = ApiError(413, _too_large(limit), code="body_too_large")
            await error_response(refusal)(scope, receive, send)
            return
        until = asyncio.get_running_loop().time() + self._seconds
        received, more = 0, True

        async def limited() -> Message:
            nonlocal received, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout_at(until + received / _SLOWEST):
                    message = await receive()
            except TimeoutError:
                problem = f"The body does not come: {received} bytes so far. Send it faster."
                raise HTTPException(408, problem, headers={"Connection": "close"}) from None
            more = bool(message.get("more_body", False))
            received += len(message.get("body", b""))
            if received > limit:
                raise HTTPException(413, _too_large(limit))
            return message

        await self._app(scope, limited, send)


def _too_large(limit: int) -> str:
    return f"The body is larger than this server's limit of {limit} bytes."
