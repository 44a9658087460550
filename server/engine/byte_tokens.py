"""Tokens that stand for a byte, as tokenizers with byte fallback name them."""

import re

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def byte_of(name: str) -> bytes | None:
    """The byte that a token of this name stands for, as byte fallback names them; None: it stands
    for text."""
    found = _BYTE.fullmatch(name)
    return None if found is None else bytes.fromhex(found[1])
