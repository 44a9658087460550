"""Sends an answer where nothing else has."""

import asyncio
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.server.errors import RETRY_SOON, ApiError, error_response


class AnswerAll:
    """ASGI middleware: however a request ends, an answer of our shape is sent if none has begun.

    Only the drain cancels a request. Starlette's handlers do not catch a BaseException, such as a
    panic in a library's Rust code.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        def noting(message: Message) -> Awaitable[None]:
            """Not a coroutine: it is called for every token of a stream."""
            nonlocal has_begun
            has_begun = True
            return send(message)

        try:
            await self._app(scope, receive, noting)
        except asyncio.CancelledError:
            if has_begun:
                raise
            await error_response(_cut_short(scope["method"]))(scope, receive, send)
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error


def _cut_short(method: str) -> ApiError:
    doubt = "" if method == "GET" else " Look first whether it was done."
    message = f"The server is shutting down and could not finish this; send it again.{doubt}"
    headers = RETRY_SOON | {"Connection": "close"}
    return ApiError(503, message, code="stopping", headers=headers)
