"""Checks API keys and their roles, before a request's body is read."""

import hashlib
import hmac
import logging
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import ApiError, error_response

log = logging.getLogger(__name__)

Role = Literal["generate", "admin", "metrics"]
"""`metrics` may read `/metrics` and nothing else. `admin` may read them too, `generate` may not:
they show every key's requests."""
_CALLER = "infuse.caller"
_ADMIN = ("/v1/adapters", "/v1/merges")
_OPEN = ("/health", "/docs", "/redoc", "/openapi.json")


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1)
    key: SecretStr = Field(min_length=16)
    roles: frozenset[Role] = Field(min_length=1)

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.key.get_secret_value().encode()).digest()


class BadKeysFile(Exception):
    """The keys file cannot be used; the message says why, without a key in it."""


def read_keys(path: Path) -> list[Key]:
    """Read the keys file. Raises BadKeysFile."""
    try:
        keys = TypeAdapter(list[Key]).validate_json(path.read_bytes())
    except OSError as error:
        raise BadKeysFile(f"the keys file {path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise BadKeysFile(f"the keys file {path} is wrong at {where}: {first['msg']}") from None
    if not keys:
        raise BadKeysFile(f"the keys file {path} holds no key; nobody could use the server")
    if path.stat().st_mode & stat.S_IROTH:
        log.warning("The keys file %s can be read by every user of this machine.", path)
    return keys


class Authorize:
    """ASGI middleware that checks a request's key before its body is read. Without keys every
    request is allowed."""

    def __init__(self, app: ASGIApp, keys: Sequence[Key], most_at_once: int) -> None:
        """`most_at_once`: how many requests one key may have running."""
        self._app = app
        self._keys = [(key, key.digest) for key in keys]
        self._most_at_once = most_at_once
        self._running: Counter[str] = Counter()
        """Key name -> how many of its requests are not answered yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys:
            await self._app(scope, receive, send)
            return
        # Refused before a body is read; a dependency would come after the form is parsed.
        refusal = self._refusal(scope)
        if refusal is not None:
            await error_response(refusal)(scope, receive, send)
            return
        caller = scope.get(_CALLER)
        if caller is None:
            await self._app(scope, receive, send)
            return
        self._running[caller] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._running[caller] -= 1

    def _refusal(self, scope: Scope) -> ApiError | None:
        path = str(scope["path"])
        if path in _OPEN or path.startswith(tuple(f"{each}/" for each in _OPEN)):
            return None
        header = Headers(scope=scope).get("authorization", "")
        scheme, _, given = header.partition(" ")
        key = self._find(given.strip()) if scheme.lower() == "bearer" else None
        if key is None:
            return ApiError(
                401,
                "No valid API key was given; send it as 'Authorization: Bearer <key>'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        roles = _roles(path)
        if not key.roles & set(roles):
            named = " or ".join(f"'{role}'" for role in roles)
            message = f"The key '{key.name}' lacks the role {named}, which {path} needs."
            return ApiError(403, message, code="missing_role")
        if self._running[key.name] >= self._most_at_once:
            message = f"The key '{key.name}' has {self._most_at_once} requests at once already."
            headers = {"Retry-After": "1"}
            return ApiError(429, message, code="too_many_requests", headers=headers)
        scope[_CALLER] = key.name
        return None

    def _find(self, given: str) -> Key | None:
        digest = hashlib.sha256(given.encode()).digest()
        found = None
        for key, expected in self._keys:
            if hmac.compare_digest(digest, expected):
                found = key
        return found


def _roles(path: str) -> tuple[Role, ...]:
    """The roles of which a path needs one."""
    if path == "/metrics":
        return "metrics", "admin"
    return ("admin",) if path.startswith(_ADMIN) else ("generate",)


async def get_caller(request: Request) -> str | None:
    """FastAPI dependency: the name of the key that a request came with; None without keys.

    Async, as FastAPI runs others in a thread.
    """
    name: str | None = request.scope.get(_CALLER)
    return name


Caller = Annotated[str | None, Depends(get_caller)]
