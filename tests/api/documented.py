"""Sees that a server answers nothing that its OpenAPI document does not name."""

import re
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from server.api.preparing import CLIENT_GONE

UNFORESEEN = b"The server failed; its log says why."
"""What no document foresees."""


class Documented:
    """An application, and which of its answers were not as documented."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app
        self._paths = [
            (re.compile(re.sub(r"\\{.*?\\}", ".+", re.escape(path))), operations)
            for path, operations in sorted(app.openapi()["paths"].items(), key=_unknown_characters)
        ]
        self.strays: list[str] = []

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
        if UNFORESEEN in body or start["status"] in (405, CLIENT_GONE):
            # 405 is for what no operation is; nobody is there to see the other.
            return
        where = f"{scope['method']} {scope['path']}: {status}"
        documented = operation["responses"].get(status)
        if documented is None:
            self.strays.append(f"{where} {body[:200]!r}")
            return
        headers = Headers(raw=start["headers"])
        kind = headers.get("content-type", "").partition(";")[0]
        if kind and kind not in documented.get("content", {}):
            self.strays.append(f"{where} is {kind}")
        for name, header in documented.get("headers", {}).items():
            if header["required"] and name not in headers:
                self.strays.append(f"{where} has no {name}")


def _unknown_characters(path: tuple[str, Any]) -> tuple[int, int]:
    """Paths with more text of their own come first."""
    return (-len(re.sub(r"\{.*?\}", "", path[0])), 0)
