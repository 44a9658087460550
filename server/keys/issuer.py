"""An OIDC issuer: its public keys, which are fetched and followed."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx2
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, OKPKey, RSAKey
from pydantic import BaseModel, ValidationError

from infuse.server.engine.fair_turns import FairTurns

log = logging.getLogger(__name__)

PublicKey = RSAKey | ECKey | OKPKey
_DISCOVERY = "/.well-known/openid-configuration"
LOOK_SECONDS = 300.0
"""How often the issuer is asked for its keys."""
PAUSE = 10.0
"""Seconds from an answer of the issuer, or from waiting for one in vain, to the next question."""
ANSWER_SECONDS = 5.0
"""Seconds that the issuer has to tell its keys."""
_MOST_BYTES = 1 << 20
"""The longest answer that is read."""
_MOST_WAITING = 32
"""How many requests may wait until the issuer tells its keys."""


class IssuerUnavailable(Exception):
    """The issuer does not tell its keys, so nobody knows whether a token is good."""


class _Discovery(BaseModel):
    issuer: str
    jwks_uri: str


class _KeySet(BaseModel):
    keys: list[dict[str, Any]]


class Issuer:
    """Holds the public keys of an issuer. Belongs to one event loop.

    A request whose token names a known key waits for nothing. One that names another has the issuer
    asked, unless it was asked just now.
    """

    def __init__(self, url: str, now: Callable[[], float] = time.monotonic) -> None:
        self.url = url
        self.is_unreachable = False
        """Whether it has not told its keys when it was asked last; those before are used then."""
        self._keys: dict[str, PublicKey] = {}
        self._now = now
        self._asked = -math.inf
        """When it was asked last."""
        self._asking = FairTurns(1, 1, _MOST_WAITING)
        self._tls = httpx2.create_ssl_context()

    async def key(self, kid: str) -> PublicKey | None:
        """The key of this id; None where the issuer has none. Raises IssuerUnavailable, and
        QueueFull where too many requests wait for the issuer."""
        if kid not in self._keys:
            async with self._asking.turn("requests"):
                if kid not in self._keys and self._now() - self._asked >= PAUSE:
                    await self.look()
        if kid not in self._keys and self.is_unreachable:
            raise IssuerUnavailable
        return self._keys.get(kid)

    async def follow(self) -> None:
        """Ask the issuer again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(PAUSE if self.is_unreachable else LOOK_SECONDS)

    async def look(self) -> None:
        """Ask the issuer for its keys. Where it does not tell them, those before stay."""
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                self._keys = await self._fetch()
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, TimeoutError) as error:
            if not self.is_unreachable:
                log.error("The keys of tokens stay as they were: %s.", _why(error))
            self.is_unreachable = True
        else:
            if self.is_unreachable:
                log.info("The issuer %s tells its keys again.", self.url)
            self.is_unreachable = False
        self._asked = self._now()

    async def _fetch(self) -> dict[str, PublicKey]:
        """Raises HTTPError, InvalidURL, ValueError."""
        async with httpx2.AsyncClient(verify=self._tls, timeout=None) as client:
            at = self.url.rstrip("/") + _DISCOVERY
            discovery = _Discovery.model_validate_json(await _get(client, at))
            if discovery.issuer != self.url:
                raise ValueError(f"{at} is of the issuer {discovery.issuer[:200]!r}")
            if urlsplit(discovery.jwks_uri).scheme not in ("https", urlsplit(self.url).scheme):
                raise ValueError(f"{at} leads to keys that do not come over HTTPS")
            found = _KeySet.model_validate_json(await _get(client, discovery.jwks_uri))
        keys = map(_public_key, found.keys)
        return {key.kid: key for key in keys if key is not None and key.kid is not None}


async def _get(client: httpx2.AsyncClient, url: str) -> bytes:
    """Raises HTTPError, InvalidURL, ValueError. Follows no redirect."""
    body = b""
    async with client.stream("GET", url, headers={"Accept-Encoding": "identity"}) as answer:
        if answer.status_code != 200:
            raise ValueError(f"{url} answers {answer.status_code}")
        async for part in answer.aiter_raw():
            body += part
            if len(body) > _MOST_BYTES:
                raise ValueError(f"{url} sends more than {_MOST_BYTES} bytes")
    return body


def _public_key(data: dict[str, Any]) -> PublicKey | None:
    """None where it is of another kind, or a secret that both sides would know."""
    try:
        key = JWKRegistry.import_key(data)
    except (JoseError, ValueError, TypeError):
        return None
    return key if isinstance(key, PublicKey) else None


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_SECONDS:g} s"
    if isinstance(error, ValidationError):
        first = error.errors(include_input=False)[0]
        return f"its answer is wrong at {'.'.join(map(str, first['loc'])) or 'all'}: {first['msg']}"
    return str(error) or type(error).__name__
