"""Checks API keys and tokens, their roles and their limits, before a request's body is read."""

from collections import defaultdict
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from infuse.server.caller import SCOPE_KEY, Caller
from infuse.server.engine.errors import QueueFull
from infuse.server.errors import RETRY_SOON, ApiError, error_response, from_engine_error, nothing_at
from infuse.server.keys.issuer import IssuerUnavailable
from infuse.server.keys.key_file import Key, Role
from infuse.server.keys.keyring import Keyring, NoEntry
from infuse.server.keys.tokens import BadToken
from infuse.server.keys.usage import Usage

KEY_HEADER = "x-api-key"
"""Anthropic's header for a key, taken where there is no bearer."""
_METRICS = "/metrics"
_DEBUG = "/debug/"
_ADMIN = ("/v1/adapters", "/v1/merges", "/v1/usage", _DEBUG)
LORA_ROUTES = (
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/load_lora_adapter",
    "/unload_lora_adapter",
)
"""By which vLLM and SGLang are given adapters. Any key is told what does the same here."""
_HEALTH = "/health"
_DOCS = ("/docs", "/redoc", "/openapi.json")
_NOWHERE = "/v1"
"""A path that no route has."""
_ANYBODY = Caller()


class Authorize:
    """ASGI middleware that checks a request's key or token before its body is read. Without keys
    every request is allowed.

    Where administration has a port of its own, its paths are on no other port, and no others on it.
    What is on another port answers as what does not exist.
    """

    def __init__(
        self,
        app: ASGIApp,
        keyring: Keyring | None,
        admin_port: int | None,
        open_docs: bool,
        most_at_once: int,
    ) -> None:
        """`open_docs`: whether the documentation needs no key. `most_at_once`: how many requests
        one key may have running."""
        self._app = app
        self._keyring = keyring
        self._admin_port = admin_port
        self._open = (_HEALTH, *_DOCS) if open_docs else (_HEALTH,)
        self._most_at_once = most_at_once
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)
        """By the name of a key."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = str(scope["path"])
        is_here = self._is_here(scope, path)
        app = self._app if is_here else _nothing
        if self._keyring is None or _is_at(path, self._open) or _is_console(path):
            await app(scope, receive, send)
            return
        # Refused before a body is read; a dependency would come after the form is parsed.
        try:
            key = await _key(self._keyring, scope)
            _check_role(key, path if is_here else _NOWHERE, path)
            caller = Caller(key.name, key.scope, self._usage[key.name])
            caller.begin_http(self._most_at_once)
        except ApiError as refusal:
            await error_response(refusal)(scope, receive, send)
            return
        scope[SCOPE_KEY] = caller
        try:
            await app(scope, receive, send)
        finally:
            caller.end_http()

    def _is_here(self, scope: Scope, path: str) -> bool:
        """Whether a path is on the port at which the request came."""
        if self._admin_port is None or _is_at(path, (_HEALTH, *_DOCS)) or _is_console(path):
            return True
        is_admins = _is_at(path, (_METRICS,)) or path.startswith(_ADMIN)
        _, port = scope["server"]
        return is_admins is bool(port == self._admin_port)


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    """An application without routes."""
    await error_response(nothing_at(scope["method"], scope["path"]))(scope, receive, send)


async def _key(keyring: Keyring, scope: Scope) -> Key:
    """The key that a request gives. Raises ApiError 401, 403, 429, 503."""
    headers = Headers(scope=scope)
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get(KEY_HEADER, "")
    key = await _entry(keyring, given.strip()) if given else None
    if key is None:
        raise ApiError(
            401,
            "No valid API key was given; send it as 'Authorization: Bearer <key>', or as "
            "'x-api-key: <key>'.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return key


async def _entry(keyring: Keyring, given: str) -> Key | None:
    """Raises ApiError 401, 403, 429, 503."""
    try:
        return await keyring.find(given)
    except QueueFull as error:
        raise from_engine_error(error) from None
    except BadToken as error:
        message = f"The token is not valid: {error}."
        challenge = f'Bearer error="invalid_token", error_description="{message}"'
        headers = {"WWW-Authenticate": challenge}
        raise ApiError(401, message, code="invalid_token", headers=headers) from None
    except NoEntry:
        message = "The token is valid, and no entry of the server's keys file covers its claims."
        raise ApiError(403, message, code="unknown_claims") from None
    except IssuerUnavailable:
        message = "The token cannot be checked: its issuer does not tell the server its keys."
        raise ApiError(503, message, code="issuer_unavailable", headers=RETRY_SOON) from None


def _is_at(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a path is one of these, or below one."""
    return path in roots or path.startswith(tuple(f"{each}/" for each in roots))


def _is_console(path: str) -> bool:
    """Whether a path is a file of the console, which needs no key and is on every port."""
    return path == "/" or _is_at(path, ("/console",))


def _check_role(key: Key, path: str, shown: str) -> None:
    """`shown`: how errors name the path. Raises ApiError 403."""
    roles = _roles(path)
    if not key.roles & set(roles):
        named = " or ".join(f"'{role}'" for role in roles)
        message = f"The key '{key.name}' lacks the role {named}, which {shown} needs."
        raise ApiError(403, message, code="missing_role")
    shows_all = path == _METRICS or path.startswith(_DEBUG)
    if shows_all and key.scope.is_tenants:
        message = f"{shown} shows the requests of all keys; the scope of '{key.name}' is its own."
        raise ApiError(403, message, code="out_of_scope")


def _roles(path: str) -> tuple[Role, ...]:
    """The roles of which a path needs one."""
    if path == _METRICS:
        return "metrics", "admin"
    if _is_at(path, _DOCS):
        return "generate", "admin", "metrics"
    if path in LORA_ROUTES:
        return "generate", "admin"
    return ("admin",) if path.startswith(_ADMIN) else ("generate",)


async def get_caller(request: Request) -> Caller:
    """FastAPI dependency: whose key a request came with. Async, as FastAPI runs others in a
    thread."""
    caller: Caller = request.scope.get(SCOPE_KEY, _ANYBODY)
    return caller


CallerDep = Annotated[Caller, Depends(get_caller)]
