"""An OIDC issuer on this machine: it publishes keys, and signs tokens by them."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from fastapi import FastAPI, HTTPException
from joserfc import jwt
from joserfc.jwk import ECKey, Key, OKPKey, RSAKey

from tests.publishers import serve

AUDIENCE = "infuse"
ALGORITHMS = {"rsa": "RS256", "ec": "ES256", "okp": "EdDSA"}


def _keys() -> dict[str, Key]:
    return {
        "rsa": RSAKey.generate_key(2048, {"kid": "rsa"}),
        "ec": ECKey.generate_key("P-256", {"kid": "ec"}),
        "okp": OKPKey.generate_key("Ed25519", {"kid": "okp"}),
    }


@dataclass
class LocalIssuer:
    url: str = ""
    keys: dict[str, Key] = field(default_factory=_keys)
    """All that it could sign by, by their ids."""
    published: list[dict[str, Any]] = field(default_factory=list)
    document: dict[str, Any] = field(default_factory=dict)
    """What it says of itself, if that is not the truth."""
    is_down: bool = False
    open: Event = field(default_factory=Event)
    """Until it is set, nothing is answered."""
    asked: int = 0
    """How often it was asked for its keys."""

    def publish(self, *kids: str) -> None:
        self.published = [dict(self.keys[kid].as_dict(private=False)) for kid in kids]

    def token(self, kid: str = "ec", **changes: Any) -> str:
        """A token that is valid, but for the changes of its claims; None leaves a claim out."""
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": "app", "iat": now, "exp": now + 600}
        given = {name: value for name, value in (claims | changes).items() if value is not None}
        algorithm = ALGORITHMS[kid]
        return jwt.encode({"alg": algorithm, "kid": kid}, given, self.keys[kid], [algorithm])

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/.well-known/openid-configuration")
        def discovery() -> dict[str, Any]:
            self.asked += 1
            assert self.open.wait(30), "a test left the issuer closed"
            if self.is_down:
                raise HTTPException(503)
            return {"issuer": self.url, "jwks_uri": f"{self.url}/keys"} | self.document

        @app.get("/keys")
        def keys() -> dict[str, Any]:
            return {"keys": self.published}

        return app


@contextlib.contextmanager
def local_issuer() -> Iterator[LocalIssuer]:
    """An issuer that has published all its keys."""
    issuer = LocalIssuer()
    issuer.publish(*issuer.keys)
    issuer.open.set()
    with serve(issuer.app()) as port:
        issuer.url = f"http://127.0.0.1:{port}"
        yield issuer
        issuer.open.set()
