"""What stands before all of the application: the path of a proxy, and pages of other origins."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.server import request_id

_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_READABLE = (
    "Infuse-Adapter",
    request_id.HEADER,
    "ETag",
    "Location",
    "Retry-After",
    "WWW-Authenticate",
    "Content-Disposition",
)
"""The headers of answers that pages of other origins may read, beside those that all may."""

Layer = Callable[[ASGIApp], ASGIApp]


def layers(root_path: str, origins: Sequence[str]) -> list[Layer]:
    """What to put around the application, the innermost first."""
    found: list[Layer] = []
    if root_path:
        found.append(partial(UnderPath, root_path=root_path))
    if origins:
        # No cookies: a page gives its key itself, so a browser cannot be made to use another's.
        cors = partial(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=_METHODS,
            allow_headers=("*",),
            expose_headers=_READABLE,
        )
        found.append(cors)
    return found


class UnderPath:
    """ASGI middleware that answers below a path as at the root, for a proxy that leaves the path in
    its requests. Those that come without it are answered too."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = f"{scope['path']}/"
        if path.startswith(f"{self._root_path}/"):
            # Keys' roles go by the path: nothing further in may see another one.
            scope = {**scope, "path": path[len(self._root_path) : -1] or "/"}

        def placing(message: Message) -> Awaitable[None]:
            """Not a coroutine: it is called for every token of a stream."""
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if (where := headers.get("location", "")).startswith("/"):
                    headers["location"] = self._root_path + where
            return send(message)

        await self._app(scope, receive, placing)
