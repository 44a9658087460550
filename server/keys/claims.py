"""Claims of tokens, and the patterns by which an entry of the keys file names them."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from infuse.server.keys.scope import matches

Claims = Mapping[str, Any]
"""What a token says of its bearer, by name: `sub`, `groups`, ..."""
Pattern = Annotated[str, StringConstraints(min_length=1, max_length=256)]
"""As a shell's: `*` for any characters, `?` for one, `[ab]` for one of these."""
Patterns = Annotated[tuple[Pattern, ...], Field(min_length=1)]
Name = Annotated[str, StringConstraints(min_length=1)]
ClaimPatterns = Annotated[dict[Name, Patterns], Field(min_length=1)]
_LISTS_OF_WORDS = ("scope", "scp")
"""Claims whose text is a list, with spaces between (RFC 8693, Entra ID)."""


def covers(patterns: Mapping[str, tuple[str, ...]], claims: Claims) -> bool:
    """Whether each claim that is named has a value that matches one of its patterns."""
    return all(
        any(matches(value, wanted) for value in _values(name, claims.get(name)))
        for name, wanted in patterns.items()
    )


def _values(name: str, claim: Any) -> list[str]:
    """The values of a claim: each of a list. `true` and numbers are taken as JSON writes them."""
    if isinstance(claim, str):
        return claim.split() if name in _LISTS_OF_WORDS else [claim]
    if isinstance(claim, list):
        return [each for each in claim if isinstance(each, str)]
    return [json.dumps(claim)] if isinstance(claim, bool | int) else []
