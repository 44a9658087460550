"""Checks that a server answers nothing that its OpenAPI document does not name."""

import re
from collections.abc import Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infuse.server.api.adapters import NameConvertor
from infuse.server.errors import CLIENT_GONE

UNFORESEEN = b"The server failed; its log says why."
NOTHING = b"There is nothing at "
"""The answer for what is on another port, where there is one."""
NAMES = {"{name}": NameConvertor.regex, "{model}": ".+"}
"""What parameters of paths take; others take what has no slash."""
UNDOCUMENTED = (405, CLIENT_GONE)
"""Statuses that no OpenAPI document names: of a method that there is not, so of no operation; and
what nobody is left to read."""


class Document:
    """An OpenAPI document, with which answers are compared."""

    def __init__(self, document: dict[str, Any]) -> None:
        # The paths with the most text of their own come first.
        self._paths = [
            (_pattern(path), operations)
            for path, operations in sorted(
                document["paths"].items(), key=lambda item: -len(re.sub(r"\{.*?\}", "", item[0]))
            )
        ]

    def strays(
        self, method: str, path: str, status: int, headers: Mapping[str, str], body: bytes
    ) -> list[str]:
        """What an answer has that the document does not name, or lacks. `body`: its beginning."""
        operation = self._operation(method, path)
        if operation is None or status in UNDOCUMENTED or UNFORESEEN in body:
            return []
        where = f"{method} {path}: {status}"
        documented = operation["responses"].get(str(status))
        if documented is None:
            return [f"{where} {body[:200]!r}"]
        kind = headers.get("content-type", "").partition(";")[0]
        is_named = not kind or kind in documented.get("content", {})
        strays = [] if is_named else [f"{where} is {kind}"]
        for name, header in documented.get("headers", {}).items():
            if header["required"] and name not in headers:
                strays.append(f"{where} has no {name}")
        return strays

    def _operation(self, method: str, path: str) -> dict[str, Any] | None:
        for pattern, operations in self._paths:
            # A path with a slash at its end is redirected to the one without.
            if pattern.fullmatch(path) and method.lower() in operations and path[-1] != "/":
                return dict(operations[method.lower()])
        return None


def _pattern(path: str) -> re.Pattern[str]:
    """What a path of the document stands for."""
    parts = re.split(r"(\{.*?\})", path)
    return re.compile(
        "".join(
            NAMES.get(part, "[^/]+") if part.startswith("{") else re.escape(part) for part in parts
        )
    )


class Documented:
    """ASGI middleware that adds each answer that is not as documented to `strays`."""

    def __init__(
        self, app: ASGIApp, document: dict[str, Any], strays: list[str], has_ports: bool
    ) -> None:
        """`has_ports`: administration has a port of its own, and the document has both."""
        self._app = app
        self._has_ports = has_ports
        self._document = Document(document)
        self._strays = strays

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message = {}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
            elif start:
                request, headers = (scope["method"], scope["path"]), Headers(raw=start["headers"])
                body = message.get("body", b"")
                if not (self._has_ports and NOTHING in body):
                    self._strays += self._document.strays(*request, start["status"], headers, body)
                start.clear()
            await send(message)

        await self._app(scope, receive, watched if scope["type"] == "http" else send)
