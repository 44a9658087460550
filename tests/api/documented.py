"""Checks that a server answers nothing that its OpenAPI document does not name."""

import re
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.disconnects import CLIENT_GONE

UNFORESEEN = b"The server failed; its log says why."
"""Statuses that no OpenAPI document names."""
NOTHING = b"There is nothing at "
"""The answer for what is on another port."""
UNDOCUMENTED = (405, CLIENT_GONE)
"""Of a method that there is not, so of no operation; and what nobody is left to read."""


class Documented:
    """ASGI middleware that adds each answer that is not as documented to `strays`."""

    def __init__(self, app: ASGIApp, document: dict[str, Any], strays: list[str]) -> None:
        self._app = app
        # The paths with the most text of their own come first.
        self._paths = [
            (re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(path))), operations)
            for path, operations in sorted(
                document["paths"].items(), key=lambda item: -len(re.sub(r"\{.*?\}", "", item[0]))
            )
        ]
        self._strays = strays

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = self._operation(scope) if scope["type"] == "http" else None
        start: Message = {}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif start and operation is not None:
                self._look(scope, operation, start, message.get("body", b""))
                start.clear()
            await send(message)

        await self._app(scope, receive, watched)

    def _operation(self, scope: Scope) -> dict[str, Any] | None:
        for path, operations in self._paths:
            if path.fullmatch(scope["path"]) and scope["method"].lower() in operations:
                return dict(operations[scope["method"].lower()])
        return None

    def _look(self, scope: Scope, operation: dict[str, Any], start: Message, body: bytes) -> None:
        status = str(start["status"])
        if UNFORESEEN in body or NOTHING in body or start["status"] in UNDOCUMENTED:
            return
        where = f"{scope['method']} {scope['path']}: {status}"
        documented = operation["responses"].get(status)
        if documented is None:
            self._strays.append(f"{where} {body[:200]!r}")
            return
        headers = Headers(raw=start["headers"])
        kind = headers.get("content-type", "").partition(";")[0]
        if kind and kind not in documented.get("content", {}):
            self._strays.append(f"{where} is {kind}")
        for name, header in documented.get("headers", {}).items():
            if header["required"] and name not in headers:
                self._strays.append(f"{where} has no {name}")
