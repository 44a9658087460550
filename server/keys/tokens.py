"""Checks the tokens (JWT) of an OIDC issuer, which open the server as keys do."""

import warnings

from joserfc import jws, jwt
from joserfc.errors import (
    ClaimError,
    ExpiredTokenError,
    JoseError,
    MissingClaimError,
    SecurityWarning,
    UnsupportedAlgorithmError,
)

from infuse.server.keys.claims import Claims
from infuse.server.keys.issuer import Issuer, PublicKey

_ALGORITHMS = (
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA", "Ed25519"),
)
"""Those of public keys. By HS256 whoever knows the public key could sign."""
_LEEWAY = 30
"""Seconds by which the issuer's clock and this one may differ."""
_MOST_BYTES = 16 << 10
"""The longest token."""
_UNREADABLE = "it is no signed JWT that names its key (kid)"

# Issuers still write EdDSA, which RFC 9864 renames.
warnings.filterwarnings("ignore", "EdDSA is deprecated", SecurityWarning)


class BadToken(Exception):
    """A token is not valid; the message ends that sentence, without a part of the token."""


class Tokens:
    """Checks tokens of one issuer for one audience. Belongs to one event loop."""

    def __init__(self, issuer: Issuer, audience: str) -> None:
        self.issuer = issuer
        self._audience = audience
        self._registry = jws.JWSRegistry(algorithms=_ALGORITHMS, strict_check_header=False)
        self._claims = jwt.JWTClaimsRegistry(
            leeway=_LEEWAY,
            iss={"essential": True, "value": issuer.url},
            aud={"essential": True, "value": audience},
            exp={"essential": True},
        )

    async def claims(self, token: str) -> Claims:
        """The claims of a token. Raises BadToken, IssuerUnavailable, QueueFull."""
        if len(token) > _MOST_BYTES:
            raise BadToken(f"it is longer than {_MOST_BYTES} bytes")
        kid = self._kid(token)
        key = await self.issuer.key(kid)
        if key is None:
            raise BadToken("its issuer has no key of the id (kid) that it names")
        return self._checked(token, key)

    def _kid(self, token: str) -> str:
        """The id of the key that a token says it is signed by. Raises BadToken."""
        try:
            header = jws.extract_compact(token.encode(), registry=self._registry).headers()
            kid = header["kid"]
        except (JoseError, ValueError, TypeError, KeyError):
            raise BadToken(_UNREADABLE) from None
        if not isinstance(kid, str):
            raise BadToken(_UNREADABLE)
        return kid

    def _checked(self, token: str, key: PublicKey) -> Claims:
        """Raises BadToken."""
        try:
            claims = jwt.decode(token, key, registry=self._registry).claims
            self._claims.validate(claims)
        except (JoseError, ValueError, TypeError) as error:
            raise BadToken(self._why(error)) from None
        return claims

    def _why(self, error: Exception) -> str:
        match error:
            case UnsupportedAlgorithmError():
                return f"it is signed by none of {', '.join(_ALGORITHMS)}"
            case ExpiredTokenError():
                return "it has expired"
            case MissingClaimError(claim=claim):
                return f"it lacks the claim {claim}"
            case ClaimError(claim="nbf"):
                return "it is for later (nbf)"
            case ClaimError(claim="aud"):
                return f"it is not for the audience '{self._audience}'"
            case ClaimError(claim="iss"):
                return f"it is not of the issuer {self.issuer.url}"
            case ClaimError(claim=claim):
                return f"its claim {claim} is wrong"
        return "its signature is wrong"
